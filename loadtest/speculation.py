"""Measures what speculation brings: `python -m loadtest.speculation MODEL [-s 1,32] [-r TURNS] [--config JSON]`.

One engine in-process, stepped by hand, takes the same requests in turns with speculation and without (its scheduler is
told to draft nothing, so nothing else differs); the order within a pair of turns alternates. Greedy. Prints one `RESULT
{json}` line per number of streams: medians of the tokens a second and of the ratio within each pair, with their ranges,
and what was drafted. `--repetitive` asks for loops, by prompts that are one, for models with random weights; else the
prompts are chats for the embedded model. Where `foreign_cores` is above about 0.05 something else used the machine: the
ratio of CPU seconds (`cpu_speed_up`) is then worth more than that of the wall's, though caches are still shared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from itertools import count

import torch

from loadtest.workload import CpuMeter
from serve.model_folder import find_model
from serve.options import ModelOptions, SpeculativeOptions
from serve.request import SamplingParams
from serve.text.build import TextEngine, build_engine
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence
from serve.text.speculation.draft_length import AdaptiveLength

SUBJECTS = (
    "cat",
    "dog",
    "king",
    "boat",
    "tree",
    "bird",
    "fox",
    "girl",
    "boy",
    "wolf",
    "farmer",
    "horse",
    "queen",
    "mouse",
)
names = count()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.speculation", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, hub id or embedded model")
    parser.add_argument("-s", "--streams", default="1,32", help="numbers of requests at a time")
    parser.add_argument("-r", "--turns", type=int, default=9, help="pairs of turns")
    parser.add_argument("-n", "--num-output", type=int, default=128, help="output tokens at most")
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--config", help="speculative_config as JSON; default: the model's own")
    parser.add_argument("--repetitive", action="store_true", help="prompts that repeat themselves, of random tokens")
    parser.add_argument("--warm-up", type=int, default=1, help="pairs of turns before those that count, at least 1")
    parser.add_argument("-o", "--out", help="append the lines to this file too")
    args = parser.parse_args(arguments)

    options = ModelOptions(
        model=args.model,
        threads=args.threads,
        enable_prefix_caching=False,
        speculative_config=None if args.config is None else SpeculativeOptions(**json.loads(args.config)),
    )
    engine, card = build_engine(options, progress=False)
    make = repetitive_prompts if args.repetitive else Chats(options).prompts
    for num_streams in map(int, args.streams.split(",")):
        about = {
            "benchmark": "speculation",
            "model": card.name,
            "config": args.config or "default",
            "dtype": card.dtype,
            "threads": args.threads,
            "torch": torch.__version__,
            "prompts": "repetitive" if args.repetitive else "chats",
            "streams": num_streams,
        }
        prompts = [make(num_streams, turn) for turn in range(args.warm_up + args.turns)]
        result = compare(engine, prompts, args.num_output, args.warm_up)
        line = json.dumps({**about, **result})
        print("RESULT " + line, flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")


class Chats:
    """Prompts for the embedded model: stories, whose answers are its longest."""

    def __init__(self, options: ModelOptions):
        from serve.text.tokenizer import Tokenizer, TokenizerBundle

        self._tokenizer = Tokenizer(TokenizerBundle.from_folder(find_model(options, "text")[0], None))

    def prompts(self, num_streams: int, turn: int) -> list[list[int]]:
        chosen = random.Random(f"chats-{num_streams}-{turn}").choices(SUBJECTS, k=2 * num_streams)
        return [
            self._tokenizer.encode_chat([{"role": "user", "content": f"Tell me a story about a {a} and a {b}."}])
            for a, b in zip(chosen[::2], chosen[1::2])
        ]


def repetitive_prompts(num_streams: int, turn: int) -> list[list[int]]:
    """128 tokens each: a phrase of 16 random tokens, eight times."""
    content = random.Random(f"repetitive-{num_streams}-{turn}")
    return [[content.randrange(300, 30_000) for _ in range(16)] * 8 for _ in range(num_streams)]


def compare(engine: TextEngine, turns: list[list[list[int]]], num_output: int, num_warm: int) -> dict[str, object]:
    """Pairs of turns, the first `num_warm` of which only warm up: what the first probes may cost (`FIRST_PROBES`) is
    then behind the engine, and what is measured is how it goes on."""
    scheduler = engine.scheduler
    assert isinstance(scheduler, TokenScheduler) and isinstance(scheduler.draft_length, AdaptiveLength)
    length = scheduler.draft_length
    rates: dict[bool, list[float]] = {True: [], False: []}
    cpu_rates: dict[bool, list[float]] = {True: [], False: []}
    num_different, foreign = 0, []
    for turn, prompts in enumerate(turns):
        outputs, meter = {}, CpuMeter()
        for speculates in (True, False) if turn % 2 else (False, True):
            scheduler.draft_length = length if speculates else None
            if turn == num_warm:
                before = _counters(length)
            own_s = time.process_time()
            seconds, outputs[speculates] = generate(engine, prompts, num_output)
            if turn >= num_warm:
                num_tokens = sum(map(len, outputs[speculates]))
                rates[speculates].append(num_tokens / seconds)
                cpu_rates[speculates].append(num_tokens / (time.process_time() - own_s))
        foreign.append(meter.cores()[1])
        num_different += sum(a != b for a, b in zip(outputs[True], outputs[False]))
    scheduler.draft_length = length
    num_rows, num_drafted, num_accepted = (now - then for now, then in zip(_counters(length), before))
    ratios, cpu_ratios = ([on / off for on, off in zip(pairs[True], pairs[False])] for pairs in (rates, cpu_rates))
    return {
        "warm_up_pairs": num_warm,
        "pairs": len(ratios),
        "off_tok_s": round(statistics.median(rates[False]), 1),
        "on_tok_s": round(statistics.median(rates[True]), 1),
        "speed_up": round(statistics.median(ratios), 3),
        "speed_up_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "cpu_speed_up": round(statistics.median(cpu_ratios), 3),
        "cpu_speed_up_range": [round(min(cpu_ratios), 3), round(max(cpu_ratios), 3)],
        "drafted": num_drafted,
        "acceptance": round(num_accepted / num_drafted, 3) if num_drafted else None,
        "tokens_a_drafting_row": round(1 + num_accepted / num_rows, 2) if num_rows else None,
        "lately_by_position": [round(mean.value, 2) for mean in length.acceptance.lately],
        "outputs_different": num_different,
        "foreign_cores": foreign[num_warm:],
    }


def generate(engine: TextEngine, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
    """Seconds, and the outputs."""
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0)
    started = time.perf_counter()
    streams = [
        engine.submit(Sequence(id=f"{next(names)}", token_ids=list(ids), num_prompt=len(ids), sampling=sampling))
        for ids in prompts
    ]
    while engine.step():
        pass
    seconds = time.perf_counter() - started
    return seconds, [[token for update in stream.take() for token in update.token_ids] for stream in streams]


def _counters(length: AdaptiveLength) -> tuple[int, int, int]:
    return length.acceptance.num_rows, length.acceptance.num_drafted, length.acceptance.num_accepted


if __name__ == "__main__":
    main()
