"""Several ranks of one test: processes of one thread each that share a gloo group, ended when the test's call returns.

A rank runs a function of a file in a fresh interpreter with this process's import path; arguments and result travel
as pickles, so both are plain values or tensors. The first rank that fails ends the others and its error is the test's.
"""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_S = 120
"""For all ranks together, and for each wait of a collective: far beyond what a slow machine needs."""


class RankFailed(Exception):
    """A rank ended with an error: its number and its own traceback."""


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returned on each of `num_ranks` ranks. Raises RankFailed.

    `function` is at the top of a module that needs no pytest fixture; torch.distributed is initialised around it.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-ranks-") as folder:
        path = Path(folder)
        call = {"path": sys.path, "file": inspect.getfile(function), "name": function.__qualname__}
        (path / "call").write_bytes(pickle.dumps((call, pickle.dumps(arguments))))
        command = [sys.executable, __file__, folder, str(num_ranks)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank)], env=environment, stderr=(path / f"log{rank}").open("wb"))
            for rank in range(num_ranks)
        ]
        try:
            _wait(ranks, path)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [pickle.loads((path / f"result{rank}").read_bytes()) for rank in range(num_ranks)]


def _wait(ranks: list[subprocess.Popen[bytes]], path: Path) -> None:
    """Until all have ended well. Raises RankFailed with the first error written."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            break
        if time.monotonic() > deadline:
            raise RankFailed(f"{len(ranks)} ranks have not ended within {TIMEOUT_S} s")
        time.sleep(0.01)
    failed = [rank for rank, process in enumerate(ranks) if process.poll()]
    if failed:
        # A rank whose neighbour has gone fails too, a little later: the first to have written is the cause.
        errors = sorted(path.glob("error*"), key=lambda file: file.stat().st_mtime_ns)
        told = errors[0].read_text() if errors else (path / f"log{failed[0]}").read_text(errors="replace")[-4000:]
        raise RankFailed(f"rank {errors[0].name.removeprefix('error') if errors else failed[0]}:\n{told}")


def _main(folder: Path, num_ranks: int, rank: int) -> None:
    import importlib
    import runpy
    import traceback

    call, arguments = pickle.loads((folder / "call").read_bytes())
    sys.path[:] = call["path"]
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), num_ranks)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )
    try:
        file = Path(call["file"])
        if str(file.parent) in sys.path:
            found = vars(importlib.import_module(file.stem))
        else:  # a test's own module, whose name only pytest can import
            found = runpy.run_path(str(file), run_name="rank")
        function: Any = found[call["name"]]
        result = function(rank, *pickle.loads(arguments))
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
