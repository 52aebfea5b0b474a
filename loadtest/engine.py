"""Measures the engine in-process: `python -m loadtest.engine MODEL -w W1,W2,W3,S1,S32 [-r REPS] [-t THREADS]`.

Scheduler, runner and loop without HTTP, channel or tokenizer, stepped by hand on the workloads of `workload.py`; needs
torch, transformers, safetensors and numpy only. Prints one `RESULT {json}` line per workload. A repetition with
`foreign_cores` above about 0.05 is no measurement: something else used the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import count

import torch

from loadtest.workload import NAMES, Generate, Prompt, make_workload, measure
from serve.options import ModelOptions
from serve.request import SamplingParams
from serve.text.build import TextEngine, build_engine
from serve.text.sequence import Sequence


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, hub id or embedded model")
    parser.add_argument("-w", "--workloads", default="W1,W2,W3", help=f"of {','.join(NAMES)}")
    parser.add_argument("-r", "--reps", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-o", "--out", help="append the lines to this file too")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--quantization", choices=("fp8", "int8", "int4"))
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--profile", action="store_true", help="print where the host's time goes (slows it down)")
    args = parser.parse_args(arguments)

    started = time.perf_counter()
    options = ModelOptions(
        model=args.model,
        dtype=args.dtype,
        quantization=args.quantization,
        threads=args.threads,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    engine, card = build_engine(options)
    load_s = time.perf_counter() - started
    generate = offline(engine)
    generate([Prompt(make_workload("W1", "warm")[0].token_ids, 8)])
    generate([Prompt(prompt.token_ids[:48], 6) for prompt in make_workload("W2", "warm")])
    about = {
        "peer": "tandem-engine",
        "version": f"torch {torch.__version__}",
        "model": card.name,
        "config": f"{args.quantization or card.dtype} {card.device} budget {args.max_num_batched_tokens or 'default'}",
        "threads": args.threads,
        "load_s": round(load_s, 2),
    }
    for name in args.workloads.split(","):
        if args.profile:
            _profile(name, generate)
        line = json.dumps(measure(name, generate, repetitions=args.reps, about=about))
        print("RESULT " + line, flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def offline(engine: TextEngine) -> Generate:
    """Submit, step until all have ended, read the streams: the engine as a function, once it has done what it does
    while idle."""
    numbers = count()
    while engine.use_idle_time():
        pass

    def generate(prompts: list[Prompt]) -> list[list[int]]:
        streams = [engine.submit(_sequence(f"offline-{next(numbers)}", prompt)) for prompt in prompts]
        while engine.step():
            pass
        return [[token for update in stream.take() for token in update.token_ids] for stream in streams]

    return generate


def _sequence(job_id: str, prompt: Prompt) -> Sequence:
    return Sequence(
        id=job_id,
        token_ids=list(prompt.token_ids),
        num_prompt=len(prompt.token_ids),
        sampling=SamplingParams(max_tokens=prompt.num_output, temperature=0.0, ignore_eos=True),
    )


def _profile(name: str, generate: Generate) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.runcall(generate, make_workload(name, "profile"))
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
