"""Definitions of every figure, on timelines made by hand."""

from __future__ import annotations

import pytest
from loads import answered, image_ask, text_ask

from loadtest.measure.figures import client_figures, figures, timeline
from loadtest.measure.outcome import Outcome, Picture, Status
from loadtest.measure.slo import Slo, good_share

PERCENTILES = (50, 90, 99)


def failed(status: Status, error: str = "", ask=None, scheduled: float = 0.0, end: float = 1.0) -> Outcome:
    return Outcome(0, ask or text_ask(), scheduled, sent=scheduled, end=end, status=status, error=error)


def test_times_count_from_when_a_request_was_due_not_from_when_it_was_sent():
    one = answered(1.0, [1.5, 1.6, 1.9], 2.0, sent=1.4)
    assert (one.ttft, one.e2e, one.lag) == (pytest.approx(0.5), pytest.approx(1.0), pytest.approx(0.4))
    assert one.itls == [pytest.approx(0.1), pytest.approx(0.3)]


def test_tpot_shares_the_time_after_the_first_token_among_the_others():
    assert answered(0.0, [0.2, 0.5], 1.0, tokens=(10, 5)).tpot == pytest.approx(0.2)
    assert answered(0.0, [0.2], 0.2, tokens=(10, 1)).tpot is None


def test_pieces_of_several_tokens_do_not_change_tpot():
    fine = answered(0.0, [0.1 * n for n in range(1, 9)], 0.8)
    coarse = answered(0.0, [0.1, 0.8], 0.8, tokens=(10, 8))
    assert fine.tpot == pytest.approx(coarse.tpot)


def test_throughputs_divide_by_the_whole_run_and_the_steady_one_by_the_time_of_sending():
    ones = [answered(0.0, [0.5, 1.0], 1.0), answered(1.0, [1.5, 3.0], 3.0)]
    told = figures(ones, 4.0, Slo(), PERCENTILES)
    assert told["request_throughput"] == 0.5 and told["output_throughput"] == 1.0
    assert told["total_token_throughput"] == pytest.approx((4 + 20) / 4)
    assert told["steady_output_throughput"] == 2.0  # the first request's two tokens came within the second of sending
    assert (told["completed"], told["max_concurrent_requests"]) == (2, 1)


def test_names_are_those_of_vllm_bench_serve():
    told = figures([answered(0.0, [0.5, 1.0], 1.0)], 1.0, Slo(), PERCENTILES)
    names = "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput"
    names += " output_throughput total_token_throughput max_concurrent_requests"
    names += "".join(
        f" {kind}_{metric}_ms"
        for metric in ("ttft", "tpot", "itl", "e2el")
        for kind in ("mean", "median", "std", "p50", "p90", "p99")
    )
    assert set(names.split()) <= set(told)


def test_percentiles_interpolate_as_numpy_and_vllm_do():
    ones = [answered(0.0, [at / 10], at / 10) for at in range(1, 12)]
    told = figures(ones, 2.0, Slo(), (50, 90, 99))
    assert told["median_ttft_ms"] == pytest.approx(600) and told["p90_ttft_ms"] == pytest.approx(1000)
    assert told["p99_ttft_ms"] == pytest.approx(1090) and told["mean_ttft_ms"] == pytest.approx(600)


def test_gaps_of_all_requests_are_pooled():
    ones = [answered(0.0, [0.1, 0.2, 0.3], 0.3), answered(0.0, [0.1, 0.9], 0.9)]
    assert figures(ones, 1.0, Slo(), ())["mean_itl_ms"] == pytest.approx(1e3 * (0.1 + 0.1 + 0.8) / 3)


def test_failures_stand_beside_latencies_and_not_in_them():
    ones = [
        answered(0.0, [0.1], 0.1),
        failed(Status.ERROR, "500: boom"),
        failed(Status.ERROR, "500: boom"),
        failed(Status.REJECTED, "429: busy"),
        failed(Status.TIMEOUT, "no end within 1 s"),
        failed(Status.CANCELLED),
    ]
    told = figures(ones, 1.0, Slo(), PERCENTILES)
    assert [told[key] for key in ("completed", "failed", "rejected", "timeouts", "cancelled")] == [1, 4, 1, 1, 1]
    assert told["errors_by_kind"] == {"500: boom": 2, "429: busy": 1, "no end within 1 s": 1}
    assert told["p99_ttft_ms"] == pytest.approx(100)
    assert told["good_share"] == pytest.approx(1 / 5)  # what the load cancelled is neither good nor bad


def test_images_count_pictures_work_and_the_first_preview():
    picture = Picture(0, 1)
    ones = [
        answered(0.0, [], 2.0, image_ask(), pictures=[picture] * 2, previews=[0.5, 1.0], size=(1000, 500), num_steps=4),
        answered(1.0, [], 4.0, image_ask(), pictures=[picture], size=(100, 100), num_steps=10),
    ]
    told = figures(ones, 4.0, Slo(), PERCENTILES)
    assert told["image_throughput"] == 0.75
    assert told["megapixel_steps_throughput"] == pytest.approx((2 * 0.5 * 4 + 0.01 * 10) / 4)
    assert told["median_ttfp_ms"] == pytest.approx(500) and told["median_image_e2el_ms"] == pytest.approx(2500)
    assert "median_ttft_ms" not in told


def test_good_is_within_every_limit_of_its_kind():
    slo = Slo.parse(["ttft:500", "tpot:100", "image_e2el:1000"])
    assert slo.is_good(answered(0.0, [0.5, 0.6], 0.6))
    assert not slo.is_good(answered(0.0, [0.51, 0.6], 0.6))
    assert not slo.is_good(answered(0.0, [0.1, 0.9], 0.9))
    assert slo.is_good(answered(0.0, [0.4], 0.4, tokens=(1, 1)))  # one token has no TPOT
    assert slo.is_good(answered(0.0, [], 0.9, image_ask())) and not slo.is_good(answered(0.0, [], 1.1, image_ask()))
    assert not slo.is_good(answered(0.0, [], 0.9, image_ask(deadline_s=0.8)))
    assert not slo.is_good(answered(0.0, [0.1, 0.2], 0.2, flaw="3 tokens where 4 were asked"))


def test_probes_are_not_judged():
    ones = [answered(0.0, [0.1, 0.2], 0.2), answered(0.0, [9.0], 9.0, text_ask(group="probe"))]
    assert good_share(ones, Slo.parse(["ttft:500"])) == 1.0


@pytest.mark.parametrize("term", ["ttft", "ttft:fast", "speed:5"])
def test_a_limit_that_is_none_is_refused_by_name(term):
    with pytest.raises(ValueError, match="--goodput"):
        Slo.parse([term])


def test_a_timeline_tells_what_was_in_flight_and_when_tokens_came():
    ones = [
        answered(0.0, [0.1, 0.5], 0.5),
        answered(0.3, [0.7], 0.9, tokens=(1, 3)),
        failed(Status.ERROR, "x", scheduled=0.5, end=0.7),
    ]
    told = timeline(ones, 1.0, num_bins=5)
    assert told["bin_s"] == pytest.approx(0.2)
    assert told["in_flight"] == {"text": [1, 2, 2, 1, 0]}
    assert sum(told["completed"]) == 2 and sum(told["errors"]) == 1
    assert sum(told["output_tokens_per_s"]) * 0.2 == pytest.approx(5)


def test_client_lag_is_told_in_milliseconds():
    told = client_figures([answered(0.0, [], 1.0, sent=0.002), answered(1.0, [], 2.0, sent=1.004)])
    assert told["median_client_lag_ms"] == pytest.approx(3.0) and told["max_client_lag_ms"] == pytest.approx(4.0)
