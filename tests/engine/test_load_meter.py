"""What has come in since the last step counts as waiting, and what was ever accepted as work that was asked for."""

from dataclasses import replace

from serve.backend import Load
from serve.engine.job import Job
from serve.engine.load_meter import LoadMeter


class TwoSeconds:
    """A pace to which every job costs two seconds."""

    def on_step(self, batch, step_s): ...

    def on_finish(self, job): ...

    def cost_s(self, job):
        return 2.0

    def predict(self, load):
        return replace(load, backlog_s=10.0 * load.running)


def test_arrivals_wait_and_their_work_adds_up_once_a_step_was_measured():
    meter = LoadMeter(TwoSeconds())
    meter.arrive(Job(id="a"))
    assert meter.load() == Load(waiting=1, backlog_s=2.0)  # before that their cost is a guess
    meter.admit(Job(id="a"))
    meter.on_step(None, 0.0, 1.0)
    meter.count(Load(running=1))
    for name in "bc":
        meter.arrive(Job(id=name))
    assert meter.load() == Load(running=1, waiting=2, backlog_s=14.0, offered_s=4.0)
    meter.count(Load())  # all gone: what was asked for stays counted
    assert meter.load().offered_s == 4.0
