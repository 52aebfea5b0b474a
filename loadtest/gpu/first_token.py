"""One process from its start to its first token: `python -m loadtest.gpu.first_token FOLDER LOAD_FORMAT DEVICE`.

Prints the seconds of each stage as one line of JSON: what Python and torch take to be there, the device's context, the
weights, sizing the cache with the first graphs, and the first token. Their sum is the age of the process at that token.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

_IMPORTING = time.monotonic()

import torch  # noqa: E402

import serve.text.build as build  # noqa: E402
from serve.compute import process_age_s  # noqa: E402
from serve.options import ModelOptions  # noqa: E402
from serve.request import SamplingParams  # noqa: E402
from serve.text.sequence import Sequence  # noqa: E402


class _Stages:
    """Ages of the process at the ends of its stages."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = 0.0

    def end(self, name: str) -> None:
        age = process_age_s(since=_IMPORTING)
        self._seconds[name], self._last = age - self._last, age

    def tell(self) -> str:
        return json.dumps({name: round(seconds, 3) for name, seconds in self._seconds.items()})


def main() -> None:
    folder, load_format, device = sys.argv[1:]
    stages = _Stages()
    stages.end("imports")
    if device == "cuda":
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    stages.end("device")
    load_model = build.load_model

    def timed_load(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        stages.end("weights")
        return model

    build.load_model = timed_load
    options = ModelOptions(
        model=folder,
        load_format=load_format,  # type: ignore[arg-type]
        device=device,  # type: ignore[arg-type]
        threads=1 if device == "cpu" else None,
    )
    engine, card = build.build_engine(options, progress=False)
    stages.end("cache_and_graphs")
    prompt = [3 + i % (card.vocab_size - 3) for i in range(128)]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    stream = engine.submit(Sequence(id="first", token_ids=prompt, num_prompt=len(prompt), sampling=sampling))
    while engine.step():
        pass
    assert stream.take(), "no token came"
    stages.end("first_token_itself")
    print(stages.tell())


if __name__ == "__main__":
    main()
