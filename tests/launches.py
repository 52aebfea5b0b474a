"""Counts what a CUDA device would be told to compute, by what torch is told on CPU.

An operation that makes or only looks at a tensor differently launches nothing; any other is taken for one kernel. A
kernel of ours is one too. What a library launches inside one operation is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "lift_fresh", "_reshape_alias"}


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        is_only_looked_at = func.is_view and out is not None and _storage(out) == _storage(args[0])
        if not is_only_looked_at and name not in _FREE:
            self._counts[name] += 1
        return out


def _storage(x: Any) -> int:
    return (x[0] if isinstance(x, list | tuple) else x).untyped_storage()._cdata


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """What is launched inside, by name. Under Triton's interpreter; kernels of ours are counted and not computed."""
    from triton.runtime.interpreter import GridExecutor

    counts: Counter[str] = Counter()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        counts[self.fn.__name__] += 1

    with mock.patch.object(GridExecutor, "__call__", launch), _Operations(counts), torch.no_grad():
        yield counts
