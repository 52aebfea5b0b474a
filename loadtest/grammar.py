"""What constrained output costs: `python -m loadtest.grammar [MODEL] [-r REPS] [-t THREADS]`.

Three parts, one `RESULT {json}` line each: the engine's decode step with 1 and 32 rows, constrained and not, taken in
turns; the masks alone, for the model's own vocabulary and for one of 151 643 tokens made here; and how long grammars
take to pass from a request to a matcher. Needs llguidance beside what the engine needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from models.embedded.paths import EMBEDDED
from serve.engine.engine import Engine
from serve.options import ModelOptions, SpeculativeOptions
from serve.request import Grammar, SamplingParams
from serve.text.build import build_engine
from serve.text.grammar.compiler import Compiled, GrammarCompiler
from serve.text.grammar.vocabulary import Vocabulary, load_vocabulary
from serve.text.sampling.token_mask import mask_tokens_
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Row, Sequence

NUM_STEPS = 64
NUM_LARGE = 151_643
"""Tokens of Qwen's vocabulary."""
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "format": "email"},
        "kind": {"enum": ["person", "company", "other"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
GRAMMARS = {
    "records": Grammar(kind="json_schema", source=json.dumps({"type": "array", "items": RECORD, "minItems": 100})),
    "any object": Grammar(kind="json_object"),
    "date": Grammar(kind="regex", source=r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "text without digits": Grammar(kind="regex", source=r"[^0-9]{200,}"),
    "choice of 1000": Grammar(kind="choice", source=json.dumps([f"option {i * 7919 % 1000}" for i in range(1000)])),
    "sums": Grammar(kind="grammar", source='root ::= n ("+" n)*\nn ::= [0-9]+ | "(" root ")"'),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.grammar", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tandem-text", help="folder or embedded model")
    parser.add_argument("-r", "--reps", type=int, default=15)
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    folder = Path(EMBEDDED.get(args.model, args.model))
    options = ModelOptions(
        model=str(folder), threads=args.threads, speculative_config=SpeculativeOptions(num_speculative_tokens=0)
    )
    engine, card = build_engine(options, progress=False)
    scheduler = engine.scheduler
    assert isinstance(scheduler, TokenScheduler)
    compiler = GrammarCompiler(partial(load_vocabulary, folder, card.vocab_size, scheduler.eos_token_ids))
    large = GrammarCompiler(large_vocabulary)
    try:
        about = {"model": card.name, "dtype": card.dtype, "device": card.device, "threads": args.threads}
        compiled = asyncio.run(compiler.compile(GRAMMARS["records"]))
        for num_rows in (1, 32):
            print("RESULT", json.dumps(about | _steps(engine, compiled, num_rows, args.reps)), flush=True)
        for made in (compiler, large):
            print("RESULT", json.dumps(_compile_times(made)), flush=True)
            for name in GRAMMARS:
                print("RESULT", json.dumps(_masks(name, asyncio.run(made.compile(GRAMMARS[name])))), flush=True)
    finally:
        compiler.close()
        large.close()


def large_vocabulary(size: int = NUM_LARGE) -> Vocabulary:
    """Bytes, then made-up words with and without a space before them, in several scripts, one to sixteen characters."""
    choose = random.Random(0)
    alphabets = ["abcdefghijklmnopqrstuvwxyz"] * 6 + [
        "абвгдежзиклмнопрстуфхцчшэюя",
        "的一是不了人我在有他这为",
        "0123456789",
        '{}[]":,./ \n',
    ]
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    while len(tokens) < size:
        alphabet = choose.choice(alphabets)
        word = "".join(choose.choices(alphabet, k=choose.randint(1, 16)))
        tokens[(choose.choice(["", " "]) + word).encode()] = None
    return Vocabulary([*tokens, b""], special={"<|end|>": size}, end_ids=[size])


def _steps(engine: Engine[Sequence, Any, Any], grammar: Compiled, num_rows: int, reps: int) -> dict[str, Any]:
    """Median seconds of a decode step of `num_rows` greedy rows, free and constrained in turns."""
    names = count()
    medians: dict[str, list[float]] = {"free": [], "constrained": []}
    for rep in range(reps + 1):
        for kind in medians:
            for row in range(num_rows):
                sampling = SamplingParams(
                    max_tokens=NUM_STEPS + 1,
                    temperature=0.0,
                    ignore_eos=True,
                    grammar=GRAMMARS["records"] if kind == "constrained" else None,
                )
                prompt = [4 + (row * 31 + i * 7) % 900 for i in range(32)]
                engine.submit(
                    Sequence(
                        id=f"{num_rows}-{next(names)}",
                        token_ids=prompt,
                        num_prompt=len(prompt),
                        sampling=sampling,
                        matcher=grammar.start(sampling) if kind == "constrained" else None,
                    )
                )
            engine.step()  # the prompts
            times = []
            for _ in range(NUM_STEPS):
                started = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - started)
            while engine.step():
                pass
            if rep:
                medians[kind].append(statistics.median(times))
    found = {kind: statistics.median(values) for kind, values in medians.items()}
    ratios = [constrained / free for free, constrained in zip(medians["free"], medians["constrained"])]
    return {
        "what": "decode step",
        "rows": num_rows,
        "free_ms": round(1e3 * found["free"], 3),
        "constrained_ms": round(1e3 * found["constrained"], 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "us_per_row": round(1e6 * (found["constrained"] - found["free"]) / num_rows, 1),
        "reps": reps,
    }


def _masks(name: str, grammar: Compiled, num_tokens: int = 200) -> dict[str, Any]:
    """A walk through legal tokens, chosen at random: the time of each mask, of each token, and of applying 32 masks."""
    choose = random.Random(1)
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, grammar=GRAMMARS[name])
    masks, accepts = [], []
    matcher = grammar.start(sampling)
    while len(masks) < num_tokens:
        started = time.perf_counter()
        mask = matcher.mask()
        masks.append(time.perf_counter() - started)
        assert mask is not None, matcher.failure
        legal = [i for i, byte in enumerate(mask) if byte]
        byte = choose.choice(legal)
        token_id = 8 * byte + choose.choice([bit for bit in range(8) if mask[byte] >> bit & 1])
        started = time.perf_counter()
        if matcher.is_end(token_id):
            matcher = grammar.start(sampling)
        else:
            matcher.accept(token_id)
            if matcher.is_complete:
                matcher = grammar.start(sampling)
        accepts.append(time.perf_counter() - started)
    size = grammar.vocabulary.size
    rows = [_row(grammar.start(sampling), sampling) for _ in range(32)]
    scores_RV = torch.zeros(32, size)
    applied = []
    for _ in range(5):
        started = time.perf_counter()
        mask_tokens_(scores_RV, rows)
        applied.append(time.perf_counter() - started)
    return {
        "what": "masks",
        "grammar": name,
        "vocabulary": size,
        "mask_us_median": round(1e6 * statistics.median(masks), 1),
        "mask_us_p99": round(1e6 * sorted(masks)[int(0.99 * len(masks))], 1),
        "accept_us_median": round(1e6 * statistics.median(accepts), 1),
        "fill_and_apply_32_rows_ms": round(1e3 * statistics.median(applied), 3),
    }


def _row(matcher: Any, sampling: SamplingParams) -> Row:
    job = Sequence(id="", token_ids=[0], num_prompt=1, sampling=sampling, matcher=matcher)
    return Row(job, 0, [0], 0, [], True, 1)


def _compile_times(compiler: GrammarCompiler) -> dict[str, Any]:
    """Milliseconds from a request to a matcher, the process and the vocabulary started before, nothing cached."""
    started = time.perf_counter()
    asyncio.run(compiler.compile(Grammar(kind="choice", source='["a"]')))
    first_s = time.perf_counter() - started
    times = {}
    for name, grammar in GRAMMARS.items():
        started = time.perf_counter()
        made = asyncio.run(compiler.compile(grammar))
        times[name] = round(1e3 * (time.perf_counter() - started), 1)
    return {"what": "compile", "vocabulary": made.vocabulary.size, "first_s": round(first_s, 2), "ms": times}


if __name__ == "__main__":
    main()
