"""The other ranks of a text model, as its driver sees them: told every step, and sharers of its collectives.

What fails between the telling and the last collective of a step leaves the ranks out of step with each other, and is
no job's fault: it is raised as a `DeviceFault`, with the words of the peer that failed first when it was one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from models.parallel import Place
from serve.engine.interface import DeviceFault
from serve.text.step_message import Step, StepEncoder

if TYPE_CHECKING:
    from serve.ranks.group import RankGroup


class Peers:
    """Used by the engine's thread only."""

    def __init__(self, group: RankGroup, place: Place, *, max_num_seqs: int, block_size: int):
        """`place`: the driver's. `max_num_seqs`: sequences that run at a time."""
        self._group = group
        self._place = place
        self._encoder = StepEncoder(2 * max_num_seqs + 1, block_size)  # and the canary

    @property
    def num_stages(self) -> int:
        return self._place.num_stages

    def tell(self, step: Step) -> None:
        """Have every peer compute its part of `step`, after all it was told before."""
        with self.in_step():
            self._group.tell(self._encoder.encode(step))

    def tell_idle(self) -> None:
        """Have every peer use idle time."""
        with self.in_step():
            self._group.tell(b"")

    def share(self, token_ids_P: torch.Tensor) -> None:
        """Give the tokens that are on this device only to the shards beside this one."""
        if self._place.tensor_size > 1:
            dist.broadcast(token_ids_P, self._place.rank, group=self._place.tensor_group)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what all ranks do together: whatever is raised inside leaves as a DeviceFault."""
        try:
            yield
        except DeviceFault:
            raise
        except Exception as error:
            cause = self._group.explain(error)
            raise DeviceFault(f"{cause}" if cause is not error else f"a step failed on the driver: {error}") from error
