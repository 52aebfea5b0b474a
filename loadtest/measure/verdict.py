"""What a run amounts to, in a word, a sentence and an exit status.

  0  measured
  1  nothing was measured: no request was answered
  2  wrong usage
  3  the server was lost on the way; figures are of the time before
  4  answers were not what was asked for (wrong length, undecodable or blank image, another image for the same seed)
  5  fewer good requests than `--min-good` asks
130  interrupted; figures are of the time before
"""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.measure.checks import Report
from loadtest.measure.driver import Ending, Run


@dataclass(frozen=True, slots=True)
class Verdict:
    name: str
    status: int
    reason: str


def verdict(run: Run, report: Report, good_share: float, min_good: float | None, is_there: bool) -> Verdict:
    """`is_there`: whether the server could still be reached when all had ended."""
    num_ok = sum(outcome.is_ok for outcome in run.outcomes)
    if run.ending is Ending.LOST or not is_there:
        at = max((one.end for one in run.outcomes if one.is_ok), default=0.0)
        why = f"; the last error: {run.last_error}" if run.last_error else ""
        return Verdict("server_lost", 3, f"the server answered nothing more after {at:.1f} s{why}")
    if run.ending is Ending.INTERRUPTED:
        return Verdict("interrupted", 130, f"stopped after {run.duration_s:.1f} s")
    if not num_ok:
        return Verdict("nothing_measured", 1, f"no request was answered; the last error: {run.last_error or 'none'}")
    if report.num_wrong:
        flaws = sorted({outcome.flaw for outcome in run.outcomes if outcome.flaw})
        return Verdict(
            "wrong_answers", 4, f"{report.num_wrong} answers were not what was asked: {'; '.join(flaws[:3])}"
        )
    if min_good is not None and good_share < min_good:
        return Verdict("slo_missed", 5, f"{good_share:.2%} of the requests were good, less than {min_good:.2%}")
    if not is_quick(run):
        return Verdict(
            "slow_client", 0, "measured, but the client was busy most of the time: its own delay is in the figures"
        )
    return Verdict("ok", 0, "measured")


def is_quick(run: Run) -> bool:
    """Whether this process had time enough to read what came when it came. One core is all that Python uses."""
    return run.client_cores < 0.7
