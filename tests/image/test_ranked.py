"""What the driver tells the other ranks of prompts, and what it raises when a step fails."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_dit import FakeDiT
from image_engine import make_engine

from models.dit.grid import Grid
from serve.engine.interface import DeviceFault
from serve.errors import EngineDead
from serve.image.forward import Forward
from serve.image.ranked import RankedDiT


class FakeGroup:
    """Peers that are told and answer nothing; `loss` is why they are gone."""

    def __init__(self) -> None:
        self.told: list[Forward] = []
        self.loss: Exception | None = None

    def tell(self, payload: bytes) -> None:
        if self.loss is not None:
            raise self.loss
        self.told.append(Forward.from_bytes(payload))

    def explain(self, error: Exception) -> Exception:
        return self.loss or error


class FakePart:
    """Computes everything on the driver; `sent` has what was broadcast."""

    num_parameters_elsewhere = 5

    def __init__(self, model: FakeDiT) -> None:
        self.predict = model.predict
        self.sent: list[torch.Tensor] = []
        self.grid: Any = SimpleNamespace(split=Grid().split, broadcast_=self.sent.append)


@pytest.fixture
def group() -> FakeGroup:
    return FakeGroup()


@pytest.fixture
def part() -> FakePart:
    return FakePart(FakeDiT())


@pytest.fixture
def model(part, group) -> RankedDiT:
    model: Any = RankedDiT(FakeDiT(), part, group)
    return model


def predict(model: RankedDiT, conditioning: list[Any]) -> torch.Tensor:
    latents = torch.randn(len(conditioning), *model.latent_shape(16, 16))
    return model.predict(latents, torch.full((len(conditioning),), 500.0), conditioning)


def test_a_prompt_is_sent_once_and_forgotten_when_the_driver_has_forgotten_it(model, group, part):
    first, second = model.encode(["a cat", "a dog"])
    predict(model, [first, second, first])
    predict(model, [second, first])
    assert [forward.prompts for forward in group.told] == [[0, 1, 0], [1, 0]]
    assert [[prompt.number for prompt in forward.new] for forward in group.told] == [[0, 1], []]
    assert group.told[0].new[0].tensors == {"text": ("float32", (1, 16))}
    assert group.told[0].latent_shape == (4, 8, 8)
    texts, latents = part.sent[:2], part.sent[2:]
    assert torch.equal(texts[0], first.tensors["text"]) and [len(sent) for sent in latents] == [3 * 257, 2 * 257]
    del first, texts
    gc.collect()
    (third,) = model.encode(["a bird"])
    predict(model, [third, second])
    assert (group.told[2].forgotten, group.told[2].prompts) == ([0], [2, 1])
    predict(model, [third])
    assert group.told[3].forgotten == []


def test_an_engine_over_it_leaves_no_prompt_behind_with_the_peers(model, group):
    _, runner = make_engine(model)
    for _ in range(3):
        runner.check()
    held = {prompt.number for forward in group.told for prompt in forward.new}
    held -= {number for forward in group.told for number in forward.forgotten}
    assert len(held) == 1, "the canary's last"


def test_a_failing_step_is_a_device_fault_and_tells_what_a_peer_said(model, group, part):
    rows = model.encode(["a cat"])
    group.loss = EngineDead("rank 1 (pid 7) failed: MemoryError: no more")
    with pytest.raises(DeviceFault, match=r"^rank 1 \(pid 7\) failed: MemoryError: no more$"):
        predict(model, rows)
    group.loss = None

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    part.predict = fail
    with pytest.raises(DeviceFault, match=r"a step failed on the driver: .*shapes differ"):
        predict(model, rows)


def test_it_counts_the_parameters_of_all_ranks(model):
    assert model.num_parameters == FakeDiT().num_parameters + 5
