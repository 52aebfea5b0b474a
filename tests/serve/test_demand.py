"""A replica's loads over a window become what it is asked for, how long a newcomer waits, and how often too long."""

import pytest

from serve.autoscaling import Signals
from serve.backend import Load
from serve.demand import Demand
from serve.options import AutoscalingOptions

OPTIONS = AutoscalingOptions(look_back_period_s=10.0, target_wait_s=1.0)


def test_work_is_what_was_offered_and_refused_in_a_second():
    demand = Demand(OPTIONS, load_s=3.0)
    for second in range(31):  # half a second accepted and a quarter refused in each
        demand.observe(Load(running=2, offered_s=7 + second / 2), float(second), refused_s=second / 4)
    assert demand.signals() == Signals(work=0.75, jobs=2.0, load_s=3.0)


def test_a_window_of_two_samples_is_no_rate_yet():
    demand = Demand(OPTIONS, load_s=0.0)
    demand.observe(Load(), 0.0)
    demand.observe(Load(offered_s=1.0), 0.25)
    assert demand.signals().work == pytest.approx(0.2)


def test_waits_memory_and_lateness_are_shares_of_the_time_looked_back_at():
    demand = Demand(OPTIONS, load_s=0.0)
    assert demand.signals() == Signals()
    for second in range(20):
        load = Load(running=1, memory=0.4) if second < 15 else Load(running=3, memory=0.8, backlog_s=2.0)
        demand.observe(load, float(second))
    signals = demand.signals()  # of the seconds 9 to 19
    assert (signals.wait_s, signals.late) == pytest.approx((2.0 * 5 / 11, 5 / 11))
    assert (signals.memory, signals.jobs) == pytest.approx(((0.4 * 6 + 0.8 * 5) / 11, 21 / 11))
