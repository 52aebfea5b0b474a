"""Forward graphs without a GPU: buffers, padding and memory; a "replay" computes from the buffers anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_dit import FakeDiT
from image_engine import alone, drain, job, make_engine, pixels

from models.dit.base import Conditioning
from serve.image.forward_graph import SIZES, Captured, ForwardGraphs

CPU = torch.device("cpu")
BYTES = 10_000
"""Of a graph beside its buffers."""


class Captures:
    """Stands in for CUDA: remembers the rows of each capture, and replays into the tensor of the capture."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.failures: list[Exception] = []

    def __call__(self, forward: Any) -> Captured:
        if self.failures:
            raise self.failures.pop()
        output = forward().clone()
        self.rows.append(len(output))
        return Captured(lambda: output.copy_(forward()), output, BYTES)


class Trial:
    """Finishes when told, with the verdict given."""

    def __init__(self, verdicts: list[bool | None]) -> None:
        self._verdicts = verdicts

    def run(self, forward: Any) -> torch.Tensor:
        return forward()

    def is_launch_bound(self) -> bool | None:
        return self._verdicts.pop(0) if len(self._verdicts) > 1 else self._verdicts[0]


class Rig:
    def __init__(self, *verdicts: bool | None, budget: int = 1 << 30) -> None:
        self.model, self.captures = FakeDiT(), Captures()
        remaining = list(verdicts or (True,))
        self.graphs = ForwardGraphs(
            self.model, CPU, budget=budget, capture=self.captures, trial=lambda: Trial(remaining)
        )
        self.prompts = self.model.encode([f"prompt {i}" for i in range(SIZES[-1] + 1)])

    def step(self, num_rows: int, side: int = 8, seed: int = 0, prompts: list[Conditioning] | None = None) -> None:
        """One step's forward, which must be the model's own."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(num_rows, 4, side, side, generator=generator)
        times = 1000 * torch.rand(num_rows, generator=generator)
        chosen = prompts or self.prompts[seed : seed + num_rows]
        out = self.graphs.predict(latents, times, chosen)
        assert out.shape == latents.shape
        torch.testing.assert_close(out, self.model.predict(latents, times, chosen), atol=1e-5, rtol=1e-5)

    def steps(self, num: int, num_rows: int, **values: Any) -> None:
        for _ in range(num):
            self.step(num_rows, **values)


def test_replayed_forwards_equal_plain_ones_for_every_number_of_rows():
    rig = Rig()
    for seed, num_rows in enumerate((1, 2, 5, 8, 3, 7, 4, 6, 1, 5, 3, 8, 2, 7) * 4):
        rig.step(num_rows, seed=seed % 50)
    assert sorted(rig.captures.rows) == [1, 2, 3, 4, 6, 8]


def test_a_row_that_gets_another_prompt_computes_with_that():
    rig = Rig()
    rig.steps(3, 2)
    for pair in ((0, 1), (1, 0), (0, 0), (5, 6), (5, 7), (5, 6)):
        rig.step(2, prompts=[rig.prompts[i] for i in pair])
    rig.step(1)
    rig.step(2)
    assert rig.captures.rows == [2]


def test_a_shape_is_captured_at_its_third_use_and_once():
    rig = Rig()
    rig.steps(2, 4)
    assert rig.captures.rows == []
    rig.steps(3, 4)
    assert rig.captures.rows == [4]
    rig.steps(3, 4, side=12)
    assert rig.captures.rows == [4, 4]


def test_no_shape_is_captured_before_its_timing_is_there():
    rig = Rig(None, None, True)
    rig.steps(4, 4)
    assert rig.captures.rows == []
    rig.step(4)
    assert rig.captures.rows == [4]


def test_a_shape_that_keeps_the_device_busy_stays_without_a_graph_and_without_padding():
    rig = Rig(False)
    rig.model.calls.clear()
    rig.steps(5, 5)
    assert rig.captures.rows == [] and set(rig.model.calls) == {5} and rig.graphs.num_bytes == 0


def test_memory_is_counted_and_those_used_longest_ago_leave_first():
    rig = Rig(budget=3 * BYTES)
    rig.steps(3, 1)
    one = rig.graphs.num_bytes
    assert BYTES < one < 2 * BYTES  # the buffers are counted too
    rig.steps(3, 1, side=12)
    assert 2 * BYTES < rig.graphs.num_bytes <= 3 * BYTES
    rig.step(1)  # now the other is the older one
    rig.steps(3, 1, side=4)
    assert rig.graphs.num_bytes <= 3 * BYTES and len(rig.captures.rows) == 3
    rig.steps(5, 1)
    assert len(rig.captures.rows) == 3
    rig.steps(3, 1, side=12)
    assert len(rig.captures.rows) == 4


def test_a_graph_larger_than_the_budget_is_not_kept_or_tried_again():
    rig = Rig(budget=BYTES // 2)
    rig.steps(6, 2)
    assert rig.captures.rows == [2] and rig.graphs.num_bytes == 0


def test_without_memory_for_a_graph_steps_go_on(caplog: pytest.LogCaptureFixture):
    rig = Rig()
    rig.captures.failures = [torch.OutOfMemoryError("there is none left\nand here is why")]
    rig.steps(6, 2)
    assert rig.captures.rows == []
    assert [record.getMessage() for record in caplog.records] == [
        "forward graph failed rows=2 latent=(4, 8, 8) error=there is none left"
    ]
    rig.steps(3, 3)
    assert rig.captures.rows == [3]


def test_a_larger_batch_than_any_graph_runs_without():
    rig = Rig()
    rig.steps(4, SIZES[-1] + 1)
    assert rig.captures.rows == []


def test_a_forward_that_fails_is_not_a_use():
    rig = Rig()
    broken, rig.model.predict = rig.model.predict, None  # type: ignore[method-assign, assignment]
    for _ in range(3):
        with pytest.raises(TypeError):
            rig.step(2)
    rig.model.predict = broken  # type: ignore[method-assign]
    rig.steps(2, 2)
    assert rig.captures.rows == []
    rig.step(2)
    assert rig.captures.rows == [2]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_pictures_of_mixed_batches_are_those_made_alone_without_graphs(depth: int):
    """Guided and not, of two sizes, previews, joining and leaving; a tip of rounding for other rows in a forward."""
    model, captures = FakeDiT(), Captures()
    graphs = ForwardGraphs(model, CPU, budget=1 << 30, capture=captures, trial=lambda: Trial([True]))
    engine, _ = make_engine(model, depth=depth, graphs=graphs)
    wishes = [
        {
            "prompt": f"thing {i}",
            "seed": i,
            "num_steps": 4 + 2 * i,
            "guidance_scale": (1.0, 4.0)[i % 2],
            "num_previews": i % 3,
            "width": (16, 24)[i % 4 == 3],
        }
        for i in range(6)
    ]
    streams = []
    for i, wish in enumerate(wishes):
        streams.append(engine.submit(job(f"{i}", **wish)))
        engine.step()
        engine.step()
    drain(engine)
    for stream, wish in zip(streams, wishes):
        shown, expected = pixels(stream), alone(model, **wish)
        assert len(shown) == len(expected)
        assert max(np.abs(picture - other).max() for picture, other in zip(shown, expected)) <= 1 / 255
    assert len(captures.rows) >= 3
