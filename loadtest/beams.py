"""Measures beam search beside transformers: `python -m loadtest.beams MODEL [-b 4] [-s 1,8] [-r TURNS]`.

The engine in-process, stepped by hand, and `generate(num_beams=...)` take the same random prompts in turns, in float32
unless told otherwise, with the same threads; which of them goes first alternates. No end token, so both compute all
`--num-output` steps. transformers gets several requests as one batch. Prints one `RESULT {json}` line per number of
requests: medians of seconds and of the ratio within each pair of turns, and how many best outputs had the same ids.
Where `foreign_cores` is above about 0.05 something else used the machine, and the ratio of CPU seconds (`cpu_speed_up`)
says more than that of the wall's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import transformers

from loadtest.workload import CpuMeter
from serve.model_folder import find_model
from serve.options import ModelOptions
from serve.request import BeamParams, SamplingParams
from serve.text.beams.group import BeamGroup
from serve.text.build import TextEngine, build_engine

Search = Callable[[list[list[int]]], list[list[int]]]
"""Prompts → the best output of each."""
names = count()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.beams", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, hub id or embedded model")
    parser.add_argument("-b", "--num-beams", type=int, default=4)
    parser.add_argument("-s", "--requests", default="1,8", help="numbers of requests at a time")
    parser.add_argument("-r", "--turns", type=int, default=7, help="pairs of turns")
    parser.add_argument("-p", "--num-prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("-n", "--num-output", type=int, default=64, help="output tokens")
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("-o", "--out", help="append the lines to this file too")
    args = parser.parse_args(arguments)

    options = ModelOptions(model=args.model, dtype=args.dtype, threads=args.threads, enable_prefix_caching=False)
    engine, card = build_engine(options, progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        find_model(options, "text")[0], dtype=getattr(torch, args.dtype)
    ).eval()
    ours = of_engine(engine, args.num_beams, args.num_output)
    theirs = of_transformers(model, args.num_beams, args.num_output)
    for num_requests in map(int, args.requests.split(",")):
        about = {
            "benchmark": "beams",
            "model": card.name,
            "dtype": args.dtype,
            "threads": args.threads,
            "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "num_beams": args.num_beams,
            "requests": num_requests,
            "prompt_tokens": args.num_prompt,
            "output_tokens": args.num_output,
        }
        rng = random.Random(num_requests)
        sets = [
            [[rng.randrange(card.vocab_size) for _ in range(args.num_prompt)] for _ in range(num_requests)]
            for _ in range(args.turns + 1)
        ]
        line = json.dumps({**about, **compare(ours, theirs, sets)})
        print("RESULT " + line, flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def of_engine(engine: TextEngine, num_beams: int, num_output: int) -> Search:
    sampling = SamplingParams(max_tokens=num_output, ignore_eos=True, beams=BeamParams(num_beams=num_beams))

    def search(prompts: list[list[int]]) -> list[list[int]]:
        streams = [
            engine.submit(
                BeamGroup(
                    id=f"beams-{next(names)}",
                    token_ids=list(prompt),
                    num_prompt=len(prompt),
                    sampling=sampling,
                    num_returned=1,
                )
            )
            for prompt in prompts
        ]
        while engine.step():
            pass
        best = [stream.take()[-1].hypotheses[0] for stream in streams]
        return [[node.token_id for node in hypothesis.node.path()] for hypothesis in best]

    return search


def of_transformers(model: transformers.PreTrainedModel, num_beams: int, num_output: int) -> Search:
    def search(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        answer: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_output,
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found: list[list[int]] = answer[:, ids.shape[1] :].tolist()
        return found

    return search


def compare(ours: Search, theirs: Search, sets: list[list[list[int]]]) -> dict[str, object]:
    """In turns over `sets`, the first of which only warms up."""
    seconds: dict[str, list[float]] = {"tandem": [], "transformers": []}
    cpu: dict[str, list[float]] = {"tandem": [], "transformers": []}
    num_equal, foreign = 0, []
    for turn, prompts in enumerate(sets):
        found = {}
        meter = CpuMeter()
        sides = [("tandem", ours), ("transformers", theirs)]
        for name, search in sides if turn % 2 else sides[::-1]:
            started, cpu_started = time.perf_counter(), time.process_time()
            found[name] = search(prompts)
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
        foreign.append(meter.cores()[1])
        num_equal += sum(a == b for a, b in zip(found["tandem"], found["transformers"]))
    ratios = [b / a for a, b in zip(seconds["tandem"][1:], seconds["transformers"][1:])]
    return {
        **{f"{name}_s": round(statistics.median(values[1:]), 4) for name, values in seconds.items()},
        "speed_up": round(statistics.median(ratios), 2),
        "speed_up_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "cpu_speed_up": round(statistics.median(b / a for a, b in zip(cpu["tandem"][1:], cpu["transformers"][1:])), 2),
        "same_best_ids": f"{num_equal} of {sum(map(len, sets))}",
        "foreign_cores": round(statistics.median(foreign[1:]), 2),
    }


if __name__ == "__main__":
    main()
