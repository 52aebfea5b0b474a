"""Whether a request got what its model promises, counted as met or missed: burn rates and error budgets come of it.

objective       who counts                                        met when
availability    requests to a served model; neither refused as    answered to the end, without 5xx and without a
                wrong (4xx) or as too many (429) nor left by       broken stream
                their client
ttft            accepted text requests; those that are left        the first token came within `slo_ttft_s`
                earlier, only when it was late by then
tpot            text requests with two tokens or more              the mean time of later tokens is at most `slo_tpot_s`
image_deadline  accepted image requests; left ones as above        every image was there within `slo_image_s` and the
                                                                   request's own deadline

Good over all, not quantiles: only ratios of counts add up over processes and windows (The Site Reliability Workbook,
chapter 5).
"""

from __future__ import annotations

from serve.errors import InvalidRequest, Overloaded
from serve.gateway.errors import ClientGone
from serve.recorder import Recorder
from serve.request import ModelCard


class Promises:
    """Those of one model about an accepted request. Each method is called at most once, at the request's end."""

    def __init__(self, recorder: Recorder, card: ModelCard) -> None:
        self._recorder = recorder
        self._card = card

    def first_token(self, since_s: float, error: BaseException | None, *, has_come: bool) -> None:
        """`since_s`: from the request's head to the first token, or to the end without one."""
        is_early = since_s <= self._card.slo_ttft_s
        if has_come or not (is_early and isinstance(error, ClientGone)):
            _count(self._recorder, self._card.name, "ttft", is_met=has_come and is_early)

    def later_tokens(self, per_token_s: float) -> None:
        _count(self._recorder, self._card.name, "tpot", is_met=per_token_s <= self._card.slo_tpot_s)

    def image(self, since_s: float, error: BaseException | None) -> None:
        """`since_s`: from the request's head to its end."""
        is_early = since_s <= self._card.slo_image_s
        if not (is_early and isinstance(error, ClientGone)):
            _count(self._recorder, self._card.name, "image_deadline", is_met=is_early and error is None)


def availability(recorder: Recorder, model: str, error: BaseException | None) -> None:
    """Of a request that has ended, accepted or not."""
    if not isinstance(error, (InvalidRequest, Overloaded, ClientGone)):
        _count(recorder, model, "availability", is_met=error is None)


def _count(recorder: Recorder, model: str, objective: str, *, is_met: bool) -> None:
    verdict = "met" if is_met else "missed"
    recorder.count("tandem_slo_requests_total", model=model, objective=objective, verdict=verdict)
