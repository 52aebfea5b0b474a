"""What the image scheduler puts into a step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_device import make_scheduler, trajectory

from serve.errors import InvalidRequest
from serve.image.limits import Limits
from serve.image.scheduler import ImageScheduler
from serve.image.trajectory import ImageBatch, ImageOutput, Stage, Trajectory, plan_operations
from serve.request import ImageLimits


def settle(scheduler: ImageScheduler, batch: ImageBatch) -> None:
    count = len(batch.rows)
    scheduler.update(batch, ImageOutput([3] * count, [b""] * count))


def step(scheduler: ImageScheduler) -> ImageBatch:
    batch = scheduler.schedule()
    assert batch is not None
    settle(scheduler, batch)
    return batch


def ids(batch: ImageBatch) -> list[str]:
    return sorted(job.id for job in batch.jobs)


def scheduler_with(*jobs: Trajectory, **settings: int) -> ImageScheduler:
    scheduler = make_scheduler(**settings)
    for i, job in enumerate(jobs):
        job.arrival = float(i)
        scheduler.add(job)
    return scheduler


@given(num_steps=st.integers(1, 60), num_previews=st.integers(0, 70))
def test_operations_encode_then_denoise_every_step_and_end_with_the_image(num_steps: int, num_previews: int) -> None:
    operations = plan_operations(num_steps, num_previews)
    assert operations[0] == (Stage.ENCODE, 0) and operations[-1] == (Stage.DECODE, num_steps)
    assert [step for stage, step in operations if stage is Stage.DENOISE] == list(range(num_steps))
    previews = [step for stage, step in operations[:-1] if stage is Stage.DECODE]
    assert len(previews) == min(num_previews, num_steps - 1)
    assert previews == sorted(set(previews)) and all(0 < step < num_steps for step in previews)


def test_previews_are_spread_evenly() -> None:
    assert [s for stage, s in plan_operations(20, 3)[:-1] if stage is Stage.DECODE] == [5, 10, 15]


def test_requests_that_differ_in_all_but_size_share_every_forward() -> None:
    jobs = [
        trajectory(f"{i}", num_steps=6, guidance_scale=1.0 + i % 2, solver=("ddim", "flow_match_euler")[i % 2], seed=i)
        for i in range(6)
    ]
    scheduler = scheduler_with(*jobs)
    batches = [step(scheduler) for _ in range(8)]
    assert [batch.kind for batch in batches] == [Stage.ENCODE, *[Stage.DENOISE] * 6, Stage.DECODE]
    assert all(len(batch.rows) == 6 for batch in batches)
    assert batches[1].num_rows == 9 and batches[-1].num_rows == 6
    assert scheduler.schedule() is None and scheduler.load().running == 0


def test_a_newcomer_is_encoded_at_once_and_takes_part_in_the_next_denoise_step() -> None:
    scheduler = scheduler_with(trajectory("old", num_steps=9))
    for _ in range(4):
        step(scheduler)
    scheduler.add(trajectory("new", num_steps=3))
    assert (ids(batch := step(scheduler)), batch.kind) == (["new"], Stage.ENCODE)
    assert (ids(batch := step(scheduler)), batch.kind) == (["new", "old"], Stage.DENOISE)
    assert sorted(row.step for row in batch.rows) == [0, 3]


def test_sizes_take_turns() -> None:
    jobs = [trajectory("a"), trajectory("b"), trajectory("wide", width=8)]
    scheduler = scheduler_with(*jobs)
    step(scheduler)
    assert [ids(step(scheduler)) for _ in range(4)] == [["a", "b"], ["wide"], ["a", "b"], ["wide"]]


def test_the_cap_counts_latent_tokens_times_rows_and_turns_go_round_inside_a_group() -> None:
    jobs = [trajectory(f"{i}", guidance_scale=2.0, num_steps=50) for i in range(4)]
    scheduler = scheduler_with(*jobs, max_num_batched_tokens=3 * 8)  # 4x4 pixels: four tokens, two rows
    batches = [step(scheduler) for _ in range(12)]
    assert all(batch.num_tokens <= 24 for batch in batches)
    served = [job_id for batch in batches[-4:] for job_id in ids(batch)]
    assert [served.count(f"{i}") for i in range(4)] == [3, 3, 3, 3]


def test_who_needs_less_fills_what_the_next_in_turn_leaves() -> None:
    jobs = [
        trajectory("a", guidance_scale=2.0),
        trajectory("b", guidance_scale=2.0),
        trajectory("c", guidance_scale=1.0),
    ]
    scheduler = scheduler_with(*jobs, max_num_batched_tokens=12)
    step(scheduler)  # encodes a and c: three texts
    assert ids(step(scheduler)) == ["b"]
    assert ids(step(scheduler)) == ["a", "c"]


def test_an_image_larger_than_the_cap_runs_alone() -> None:
    scheduler = scheduler_with(trajectory("huge", width=64, height=64), trajectory("small"), max_num_batched_tokens=10)
    batches = [step(scheduler) for _ in range(12)]
    assert all(len(batch.rows) == 1 for batch in batches)
    assert scheduler.load().running == 0


def test_slots_bound_who_runs_and_priority_who_is_next() -> None:
    urgent = trajectory("urgent", priority=9)
    scheduler = scheduler_with(*[trajectory(f"{i}", num_steps=2) for i in range(4)], urgent, max_num_images=2)
    first_steps: dict[str, None] = {}
    while scheduler.load().running or scheduler.load().waiting:
        first_steps.update(dict.fromkeys(ids(step(scheduler))))
        assert scheduler.load().running <= 2
    assert list(first_steps) == ["0", "urgent", "1", "2", "3"]


def test_a_removed_trajectory_frees_its_slot_when_its_last_step_is_settled() -> None:
    first, second = trajectory("first"), trajectory("second")
    scheduler = scheduler_with(first, second, max_num_images=1)
    in_flight = scheduler.schedule()
    assert in_flight is not None and in_flight.jobs == [first]
    scheduler.remove(first)
    assert scheduler.schedule() is None
    settle(scheduler, in_flight)
    assert first.num_done == 0, "what came for it was stale"
    assert ids(step(scheduler)) == ["second"]


def test_after_a_failure_a_trajectory_goes_on_from_its_last_settled_step() -> None:
    job = trajectory("a", num_steps=5)
    scheduler = scheduler_with(job)
    for _ in range(3):
        step(scheduler)
    failing, later = scheduler.schedule(), scheduler.schedule()
    assert failing is not None and later is not None
    scheduler.abandon(failing)
    assert not scheduler.update(later, ImageOutput())
    again = scheduler.schedule(only=job)
    assert again is not None and [row.step for row in again.rows] == [2]


def test_load_tells_the_work_that_waits() -> None:
    scheduler = make_scheduler(max_num_images=2)
    for i in range(3):
        scheduler.add(trajectory(f"{i}", num_steps=5, guidance_scale=2.0))
    assert scheduler.load().tokens_waiting == 3 * 5 * 2 * 4
    step(scheduler)
    assert scheduler.load().tokens_waiting == 5 * 2 * 4
    assert scheduler.load().memory == 1.0


def image_limits(**values: object) -> ImageLimits:
    defaults = {
        "width": 16, "height": 16, "num_inference_steps": 4, "guidance_scale": 1.0, "size_multiple": 16,
        "max_pixels": 64 * 64, "max_steps": 50, "solvers": ("ddim", "euler"),
    }  # fmt: skip
    return ImageLimits(**{**defaults, **values})  # type: ignore[arg-type]


def make_limits(**values: object) -> Limits:
    return Limits(image_limits(**values), refuse_cats, refuse_seven)


def refuse_seven(solver: str, num_steps: int) -> None:
    if num_steps == 7:
        raise ValueError(f"{solver} cannot take 7 steps; ask for 8")


def refuse_cats(prompt: str) -> None:
    if prompt == "cat":
        raise ValueError("there is no class 'cat'; did you mean 'tabby cat'?")


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({"width": 40}, "width", "width is 40, not a multiple of 16; use 32"),
        ({"height": 0}, "height", "height is 0, not a multiple of 16; use 16"),
        ({"width": 128, "height": 64}, "size", "8192 pixels, more than the 4096"),
        ({"num_steps": 51}, "num_inference_steps", "from 1 to 50"),
        ({"num_steps": 0}, "num_inference_steps", "num_inference_steps is 0"),
        ({"num_steps": 7}, "num_inference_steps", "euler cannot take 7 steps; ask for 8"),
        ({"solver": "heun"}, "scheduler", "'heun' is not one of this model's; use one of ddim, euler"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "at least 0"),
        ({"guidance_scale": -1.0}, "guidance_scale", "at least 0"),
        ({"negative_prompt": "ugly"}, "negative_prompt", "does nothing at guidance_scale 1"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"seed": 2**64}, "seed", "from 0 to"),
        ({"num_previews": -1}, "partial_images", "at least 0"),
        ({"prompt": "cat"}, "prompt", "did you mean 'tabby cat'"),
        ({"negative_prompt": "cat", "guidance_scale": 2.0}, "negative_prompt", "did you mean"),
    ],
)
def test_what_can_never_run_is_refused_by_name_value_and_remedy(values: dict, param: str, message: str) -> None:
    fine = {"width": 32, "height": 32, "num_steps": 50, "solver": "euler", "prompt": "dog"}
    limits = make_limits()
    limits.check(trajectory(**fine))
    with pytest.raises(InvalidRequest, match=message) as refusal:
        limits.check(trajectory(**{**fine, **values}))
    assert refusal.value.param == param


def test_a_model_with_fixed_sizes_names_them() -> None:
    limits = make_limits(sizes=((16, 16), (32, 16)))
    limits.check(trajectory(width=32, height=16, solver="ddim"))
    with pytest.raises(InvalidRequest, match="16x32 is not one this model makes; use one of 16x16, 32x16"):
        limits.check(trajectory(width=16, height=32, solver="ddim"))


def test_a_longest_side_is_a_limit_of_its_own() -> None:
    limits = make_limits(max_side=64)
    limits.check(trajectory(width=64, height=16, solver="ddim"))
    with pytest.raises(InvalidRequest, match="a side longer than the 64 pixels"):
        limits.check(trajectory(width=80, height=16, solver="ddim"))


def test_a_negative_prompt_is_refused_where_guidance_takes_none() -> None:
    limits = make_limits(has_negative_prompt=False)
    limits.check(trajectory(width=16, height=16, solver="ddim", guidance_scale=4.0))
    with pytest.raises(InvalidRequest, match="takes no negative_prompt"):
        limits.check(trajectory(width=16, height=16, solver="ddim", guidance_scale=4.0, negative_prompt="ugly"))


@pytest.mark.parametrize("values", [{"guidance_scale": 2.0}, {"negative_prompt": "ugly"}])
def test_guidance_is_refused_where_there_is_none(values: dict) -> None:
    limits = make_limits(has_guidance=False)
    limits.check(trajectory(width=16, height=16, solver="ddim"))
    with pytest.raises(InvalidRequest, match="computes no guidance; leave it out"):
        limits.check(trajectory(width=16, height=16, solver="ddim", **values))
