"""A child of the rig: replicas in one process, paced or real, that write down every step they take.

    python -m loadtest.simulator.rig_replicas      one line of JSON on standard input: `Plan`

Paced ones share a process because they only sleep. It says "ready" on standard output; when its standard input closes
it writes the samples of each replica to a file and ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from loadtest.paced import PacedTextRunner, TextDevice, text_scheduler
from loadtest.simulator.samples import SamplingPace
from models.source import resolve
from serve.engine.engine import Engine
from serve.options import ModelOptions, SpeculativeOptions
from serve.recorder import EngineObserver
from serve.replica import OnDeath, Replica, Served, build
from serve.request import ModelCard
from serve.text.backend import TextBackend
from serve.text.pace import TextPace
from serve.text.tokenizer import TokenizerBundle

TOKENIZER = "tandem-text"
TOKEN_ID = 300
"""What paced devices say: a token with text, so that every one of them is an event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the child is told. Without a device the replicas are real ones of `model`."""

    secret: str
    hub_address: str
    directory: str
    num_replicas: int
    model: str
    device: TextDevice | None
    samples: str


async def main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    paces: list[SamplingPace] = []
    replicas = [await _start(plan, number, paces) for number in range(plan.num_replicas)]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    for replica in replicas:
        await replica.aclose()
    Path(plan.samples).write_text(json.dumps([[asdict(sample) for sample in pace.samples] for pace in paces]))


async def _start(plan: Plan, number: int, paces: list[SamplingPace]) -> Replica:
    options = ModelOptions(
        model=plan.model if plan.device is None else TOKENIZER,
        served_model_name=("rig",),
        speculative_config=SpeculativeOptions(num_speculative_tokens=0),
    )
    replica = Replica(
        options,
        replica_id=f"replica-{number}",
        secret=bytes.fromhex(plan.secret),
        hub_address=plan.hub_address,
        address=f"unix:{plan.directory}/replica-{number}",
        build=_builder(plan, paces),
        exit=sys.exit,
    )
    await replica.start()
    return replica


def _builder(plan: Plan, paces: list[SamplingPace]) -> Callable[[ModelOptions, EngineObserver, OnDeath], Served]:
    def build_paced(options: ModelOptions, observer: EngineObserver, on_death: OnDeath) -> Served:
        assert plan.device is not None
        scheduler = text_scheduler(plan.device)
        paces.append(SamplingPace(TextPace(scheduler)))
        engine: Engine = Engine(
            scheduler, PacedTextRunner(plan.device, TOKEN_ID), observer=observer, pace=paces[-1], on_death=on_death
        )
        engine.start()
        card = ModelCard(
            name="rig", kind="text", source="", device="paced", dtype="", num_parameters=0, threads=1, load_s=0.0,
            vocab_size=32_000, max_model_len=plan.device.kv_cache_tokens // 4,
        )  # fmt: skip
        bundle = TokenizerBundle.from_folder(Path(resolve(TOKENIZER)))
        return Served(TextBackend(engine, card), bundle.files, scheduler.kv_cache.digest)

    def build_real(options: ModelOptions, observer: EngineObserver, on_death: OnDeath) -> Served:
        served = build(options, observer, on_death)
        meter = served.backend._engine._meter  # type: ignore[attr-defined]
        meter._pace = SamplingPace(meter._pace)
        paces.append(meter._pace)
        return served

    return build_real if plan.device is None else build_paced


if __name__ == "__main__":
    asyncio.run(main())
