"""Every attention backend equals the sdpa reference on the same steps, and a sequence does not feel its mates."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.attention import cpu, cpu_decodes
from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.attention.build import make_attention
from models.staging import Staging

FAST = ("cpu",)
NUM_BLOCKS = 96
STAGING = Staging(torch.device("cpu"))
HEADS = ((4, 2, 16), (4, 4, 32), (6, 1, 64), (16, 8, 128))
TOLERANCE = {
    torch.float32: {"atol": 2e-6, "rtol": 1e-5},  # sums over at most 600 keys
    torch.bfloat16: {"atol": 5e-2, "rtol": 2e-2},  # eight bits of mantissa on scores up to 12 and values of size one
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["float32", "bfloat16", "bfloat16, compiled"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """In bfloat16, decodes on CPU are computed by torch's kernels or by a compiled loop."""
    if request.param.endswith("compiled"):
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(cpu_decodes, "_compiled", lambda spec: None)
    return torch.float32 if request.param == "float32" else torch.bfloat16


def spec_of(kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int = 16) -> KVCacheSpec:
    return KVCacheSpec(1, kv_heads, head_dim, block_size, dtype, torch.device("cpu"))


class Steps:
    """Random steps over some sequences whose blocks are scattered; the same ones for every backend."""

    def __init__(self, spec: KVCacheSpec, num_heads: int, seed: int = 0):
        self.spec, self.num_heads = spec, num_heads
        self.generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(NUM_BLOCKS, generator=self.generator).tolist()
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def next(self, new: dict[str, int]) -> tuple[TokenLayout, torch.Tensor, torch.Tensor]:
        layout = TokenLayout(
            num_new=list(new.values()),
            num_computed=[self.lengths.get(name, 0) for name in new],
            block_tables=[self.tables.setdefault(name, []) for name in new],
        )
        for name, num in new.items():
            self.lengths[name] = self.lengths.get(name, 0) + num
            while len(self.tables[name]) * self.spec.block_size < self.lengths[name]:
                self.tables[name].append(self.free.pop())
        total, kv_heads, head_dim = sum(new.values()), self.spec.num_kv_heads, self.spec.head_dim
        q, new = (
            torch.randn(total, *heads, head_dim, generator=self.generator).to(self.spec.dtype)
            for heads in ((self.num_heads,), (2, kv_heads))
        )
        return layout, q, new


SCHEDULE: list[dict[str, int]] = [
    {"a": 40, "b": 1},
    {"a": 1, "b": 1, "c": 300},
    {"c": 1, "d": 17, "a": 1, "b": 30},
    {"a": 1, "b": 1, "c": 1, "d": 1},
    {"d": 1, "c": 280, "a": 1},
    {"b": 1, "a": 1, "d": 1, "c": 1},
]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_backend_equals_the_reference(
    name: str, window: int | None, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    spec = spec_of(kv_heads, head_dim, dtype)
    compare(make_attention(name, spec, heads), spec, heads, window)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("block_size", [1, 4, 8, 24, 32])
def test_backend_equals_the_reference_at_any_block_size(name: str, block_size: int) -> None:
    spec = spec_of(2, 16, torch.float32, block_size)
    schedule = [{"a": 20, "b": 1}, {"a": 1, "b": 1, "c": 9}, {"c": 1, "a": 1, "b": 1}]
    compare(make_attention(name, spec, 4), spec, 4, 10, schedule)


@pytest.mark.parametrize("name", FAST)
def test_backend_equals_the_reference_with_capped_scores(name: str) -> None:
    spec = spec_of(2, 16, torch.float32)
    compare(make_attention(name, spec, 4), spec, 4, None, softcap=1.5)


def test_several_groups_of_decodes_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.attention import decode_groups

    monkeypatch.setattr(decode_groups, "_GROUP_BYTES", 20 * 16 * 2 * 2 * 16 * 4)
    spec = spec_of(2, 16, torch.float32)
    compare(make_attention("cpu", spec, 4), spec, 4, None)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("num_common", [140, 200])
def test_decodes_that_begin_with_the_same_blocks_equal_the_reference(
    num_common: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Six share a prompt, one of them by fewer blocks, two share nothing; and a chunk computes beside them."""
    spec = spec_of(kv_heads, head_dim, dtype)
    backend, reference = make_attention("cpu", spec, heads), make_attention("sdpa", spec, heads)
    steps = Steps(spec, heads)
    layers = [backend.allocate(NUM_BLOCKS)[0], reference.allocate(NUM_BLOCKS)[0]]
    family = [f"f{index}" for index in range(6)]

    def run(new: dict[str, int]) -> None:
        layout, q, new_kv = steps.next(new)
        found, expected = (
            attention.attend(q, new_kv, kv, attention.plan(layout, STAGING), scale=0.2)
            for attention, kv in zip((backend, reference), layers, strict=True)
        )
        torch.testing.assert_close(found, expected, **TOLERANCE[dtype])

    run({"prompt": num_common, "x": 150, "y": 20})
    for index, name in enumerate(family):
        num_blocks = (num_common - 1) // spec.block_size - (index == 5)
        steps.tables[name] = steps.tables["prompt"][:num_blocks]
        steps.lengths[name] = num_blocks * spec.block_size
    run({name: 5 + 9 * index for index, name in enumerate(family)})
    run({"x": 1, "f3": 1, **dict.fromkeys(family, 1), "y": 1})
    run({"f0": 1, "f1": 1, "f2": 1, "y": 12, "f5": 1, "f4": 1, "x": 1})


def departures_and_arrivals() -> list[dict[str, int]]:
    """Nine decode long enough to outgrow their room, leave one by one, sit a step out, come back and are joined."""
    names = "abcdefghi"
    everyone = dict.fromkeys(names, 1)
    schedule = [{name: 20 + 7 * index for index, name in enumerate(names)}, *[everyone] * 40]
    for num_left in range(1, 6):
        schedule += [dict.fromkeys(names[num_left:], 1)] * 2
    schedule += [dict.fromkeys("gh", 1), dict.fromkeys("ghi", 1), {"g": 3, "h": 1, "i": 1}, dict.fromkeys("ghi", 1)]
    return schedule + [{"z": 50, "g": 1, "i": 1}] + [dict.fromkeys("hzgi", 1)] * 3


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_decodes_that_leave_and_join_equal_the_reference(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    spec = spec_of(kv_heads, head_dim, dtype)
    compare(make_attention("cpu", spec, heads), spec, heads, None, departures_and_arrivals())


@pytest.mark.parametrize("max_positions", [0, 300, 600])
def test_decodes_without_memory_for_copies_equal_the_reference(
    max_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.attention import decode_groups

    spec = spec_of(2, 16, torch.float32)
    position_bytes = spec.block_bytes / spec.block_size
    monkeypatch.setattr(cpu, "_COPIES_SHARE", max_positions * position_bytes / (NUM_BLOCKS * spec.block_bytes))
    monkeypatch.setattr(decode_groups, "_GROUP_BYTES", 200 * position_bytes)
    compare(make_attention("cpu", spec, 4), spec, 4, None, departures_and_arrivals())


def test_a_step_that_was_planned_and_never_computed_is_made_good() -> None:
    spec = spec_of(2, 16, torch.float32)
    backend, reference = make_attention("cpu", spec, 4), make_attention("sdpa", spec, 4)
    (ours,), (theirs,) = backend.allocate(NUM_BLOCKS), reference.allocate(NUM_BLOCKS)
    steps = Steps(spec, 4)
    for number, new in enumerate([{"a": 20, "b": 33}, *[{"a": 1, "b": 1}] * 6]):
        layout, q, new_kv = steps.next(new)
        if number == 3:  # the step fails after the plan, before the first layer, and is repeated
            backend.attend(q, new_kv, torch.zeros_like(ours), backend.plan(layout, STAGING), scale=1.0)
        out = backend.attend(q, new_kv, ours, backend.plan(layout, STAGING), scale=1.0)
        torch.testing.assert_close(out, reference.attend(q, new_kv, theirs, reference.plan(layout, STAGING), scale=1.0))


def test_decode_on_cpu_is_bit_equal_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    """For torch's kernels over sizes where MKL's agree; the compiled loop knows no mates."""
    spec = spec_of(2, 32, dtype)
    lengths = {"a": 33, "b": 290, "c": 64, "d": 5}
    alone = {name: decode_with({name: lengths[name]}, spec)[name] for name in lengths}
    for size in (2, 3, 4):
        for mates in itertools.combinations(lengths, size):
            for name, out in decode_with({mate: lengths[mate] for mate in mates}, spec).items():
                assert torch.equal(out, alone[name]), f"{name} among {mates}"


def test_blocks_of_a_poisoned_sequence_are_safe_to_reuse(dtype: torch.dtype) -> None:
    spec = spec_of(2, 16, dtype)
    attention = make_attention("cpu", spec, 4)
    (cache,) = attention.allocate(4)
    ones = torch.ones(64, 2, 2, 16, dtype=dtype)
    poisoned = TokenLayout(num_new=[64], num_computed=[0], block_tables=[[0, 1, 2, 3]])
    nan = float("nan")
    attention.attend(ones[:, 0].repeat(1, 2, 1), ones * nan, cache, attention.plan(poisoned, STAGING), scale=1.0)
    for start, num in ((0, 18), (18, 1), (19, 14), (33, 1)):
        layout = TokenLayout(num_new=[num], num_computed=[start], block_tables=[[2, 0, 1]])
        q = ones[:num, 0].repeat(1, 2, 1)
        out = attention.attend(q, ones[:num], cache, attention.plan(layout, STAGING), scale=1.0)
        torch.testing.assert_close(out, torch.ones_like(out))


def test_a_poisoned_sequence_gives_nan_and_its_mates_their_numbers(dtype: torch.dtype) -> None:
    spec = spec_of(2, 16, dtype)
    attention = make_attention("cpu", spec, 4)
    (cache,) = attention.allocate(4)
    layout = TokenLayout(num_new=[1, 1], num_computed=[0, 0], block_tables=[[0], [1]])
    new = torch.ones(2, 2, 2, 16, dtype=dtype)
    new[0] = float("nan")
    out = attention.attend(torch.ones(2, 4, 16, dtype=dtype), new, cache, attention.plan(layout, STAGING), scale=1.0)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], torch.ones_like(out[1]))


def test_the_compiled_loop_has_the_same_bits_on_any_number_of_threads() -> None:
    pytest.importorskip("numba")
    spec = spec_of(2, 32, torch.bfloat16)
    outs = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        outs.append(decode_with({"a": 33, "b": 290, "c": 64}, spec))
    assert all(torch.equal(out[name], outs[0][name]) for out in outs for name in out)


def test_the_compiled_loop_rounds_only_its_result() -> None:
    pytest.importorskip("numba")
    spec = spec_of(2, 64, torch.bfloat16)
    attention = make_attention("cpu", spec, 6)
    (cache,) = attention.allocate(NUM_BLOCKS)
    steps = Steps(spec, 6)
    layout, q, new = steps.next({"a": 400})
    attention.attend(q, new, cache, attention.plan(layout, STAGING), scale=0.3)
    layout, q, new = steps.next({"a": 1})
    (out,) = attention.attend(q, new, cache, attention.plan(layout, STAGING), scale=0.3)
    keys, values = cache[steps.tables["a"]].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :401]
    weights = torch.softmax(q.double().view(2, 3, 64) @ keys.mT * 0.3, -1)
    torch.testing.assert_close(out.double(), (weights @ values).view(6, 64), rtol=2**-8, atol=1e-5)


def compare(
    attention: AttentionBackend,
    spec: KVCacheSpec,
    heads: int,
    window: int | None,
    schedule: list[dict[str, int]] = SCHEDULE,
    softcap: float | None = None,
) -> None:
    reference = make_attention("sdpa", spec, heads)
    steps = Steps(spec, heads)
    (ours,), (theirs,) = attention.allocate(NUM_BLOCKS), reference.allocate(NUM_BLOCKS)
    for new in schedule:
        layout, q, new_kv = steps.next(new)
        out = attention.attend(
            q, new_kv, ours, attention.plan(layout, STAGING), scale=0.3, window=window, softcap=softcap
        )
        expected = reference.attend(
            q, new_kv, theirs, reference.plan(layout, STAGING), scale=0.3, window=window, softcap=softcap
        )
        torch.testing.assert_close(out, expected, **TOLERANCE[spec.dtype])


def decode_with(lengths: dict[str, int], spec: KVCacheSpec) -> dict[str, torch.Tensor]:
    """out of one decode step of these sequences together, whose contents depend on their names only."""
    attention = make_attention("cpu", spec, 4)
    (cache,) = attention.allocate(NUM_BLOCKS)
    steps = Steps(spec, 4, seed=3)
    queries = []
    for name, length in lengths.items():
        steps.generator.manual_seed(ord(name))
        layout, q, new_kv = steps.next({name: length})
        attention.attend(q, new_kv, cache, attention.plan(layout, STAGING), scale=0.3)
        queries.append(steps.next({name: 1})[1:])
    layout = TokenLayout(
        num_new=[1] * len(lengths),
        num_computed=list(lengths.values()),
        block_tables=[steps.tables[name] for name in lengths],
    )
    q, new_kv = (torch.cat(parts) for parts in zip(*queries, strict=True))
    out = attention.attend(q, new_kv, cache, attention.plan(layout, STAGING), scale=0.3)
    return dict(zip(lengths, out, strict=True))


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'nonesuch' does not exist; choose one of auto"):
        make_attention("nonesuch", spec_of(2, 16, torch.float32), 4)
