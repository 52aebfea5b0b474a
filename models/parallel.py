"""What one rank computes of a model, and how it talks to the ranks beside it.

A model is cut twice: into stages of consecutive layers (pipeline parallel) and every layer of a stage into shards
(tensor parallel; Megatron-LM, Shoeybi et al., 2019). World rank = stage * tensor_size + tensor_rank. A layer asks its
`Place` for the sum of all shards' contributions or for their concatenation; a stage hands its activations to the rank
of the same shard in the next stage. Which share of what a rank has is arithmetic at the end of this file.

torch is imported where a group is made and nowhere else, so that the arithmetic is at hand before anything loads. The
process groups are called directly: `torch.distributed`'s own functions around them cost some 40 us a call (gloo, four
rows of 1024, two ranks: 390 against 350 us).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SMALL_SUM_BYTES = 1 << 20
"""On CPU: up to this size every rank gets every contribution whole; beyond, each sums its part of them and passes the
sum on. The first is one exchange, the second two with 2/N of the bytes: 1.6 against 1.8 ms for 128 rows of 1024 in
float32, 4.6 against 3.3 ms for 512 (two ranks on two cores, gloo)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in the grid of stages and shards. Every rank of a group makes the same calls in order."""

    tensor_rank: int = 0
    tensor_size: int = 1
    stage: int = 0
    num_stages: int = 1
    tensor_group: Any = None
    """The process group of the shards of this stage; None when there is one shard."""
    world: Any = None
    """The process group of all ranks; None when there is one stage."""
    _sent: deque[tuple[Any, torch.Tensor]] = field(default_factory=deque, repr=False, compare=False)

    @classmethod
    def join(cls, rank: int, *, tensor_size: int = 1, num_stages: int = 1) -> Place:
        """This rank's place, with the groups it talks in.

        torch.distributed must be initialised with `tensor_size * num_stages` ranks; all of them make this call.
        """
        from torch import distributed

        world: Any = distributed.group.WORLD
        stage, tensor_rank = divmod(rank, tensor_size)
        tensor_group = None
        if tensor_size > 1:
            tensor_group = world
            if num_stages > 1:
                members = [list(range(first, first + tensor_size)) for first in range(0, world.size(), tensor_size)]
                tensor_group = [distributed.new_group(ranks) for ranks in members][stage]
        return cls(tensor_rank, tensor_size, stage, num_stages, tensor_group, world if num_stages > 1 else None)

    @property
    def rank(self) -> int:
        """In the world of all stages."""
        return self.stage * self.tensor_size + self.tensor_rank

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def is_alone(self) -> bool:
        return self.tensor_size == 1 and self.num_stages == 1

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, which now holds the sum of all shards' `x`: the same bits on every one of them.

        On CPU summed in the order of the ranks, whatever the shape, so that a row does not depend on its batch; gloo's
        own reduction orders by where in the buffer an element lies. `x` must be contiguous.
        """
        group, num = self.tensor_group, self.tensor_size
        if num == 1:
            return x
        if x.device.type != "cpu":
            group.allreduce([x]).wait()
            return x
        if x.nbytes <= SMALL_SUM_BYTES:
            parts = x.new_empty(num, *x.shape)
            group._allgather_base(parts.view(-1), x.view(-1)).wait()
            return x.copy_(_sum_in_order(parts))
        each = -(-x.numel() // num)
        mine, parts = x.new_zeros(num, each), x.new_empty(num, each)
        mine.view(-1)[: x.numel()] = x.view(-1)
        group.alltoall_base(parts, mine, [], []).wait()
        group._allgather_base(mine.view(-1), _sum_in_order(parts)).wait()
        return x.copy_(mine.view(-1)[: x.numel()].view_as(x))

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The shards' `x`, all of one shape, side by side along `dim`; every shard gets the whole."""
        if self.tensor_size == 1:
            return x
        parts = x.new_empty(self.tensor_size, *x.shape)
        self.tensor_group._allgather_base(parts.view(-1), x.contiguous().view(-1)).wait()
        dim %= x.dim()
        return parts.movedim(0, dim).flatten(dim, dim + 1)

    def send(self, x: torch.Tensor) -> None:
        """Hand `x` to the next stage and go on: it is kept, and must not be changed, until it has gone.

        Waits when the next stage is more than `num_stages + 2` of them behind. Raises RuntimeError, from a later call
        perhaps, when that rank is gone.
        """
        x = x.contiguous()
        self._sent.append((self.world.send([x], self.rank + self.tensor_size, 0), x))
        self.flush(self.num_stages + 2)

    def flush(self, num_left: int = 0) -> None:
        """Wait until all but `num_left` of what was sent has gone. What has not is lost when the place is."""
        while len(self._sent) > num_left:
            work, _ = self._sent.popleft()
            work.wait()

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        """Fill `x` with what the stage before has sent, in the order it was sent."""
        self.world.recv([x], self.rank - self.tensor_size, 0).wait()
        return x


ALONE = Place()
"""One rank with the whole model."""


def _sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, from left to right for every element. `parts` is used up."""
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total


def layer_range(num_layers: int, stage: int, num_stages: int) -> range:
    """The layers of a stage: spread evenly, and never more on the last, which has the head, than on any other."""
    return range(-(-num_layers * stage // num_stages), -(-num_layers * (stage + 1) // num_stages))


def even_share(size: int, rank: int, num_ranks: int) -> range:
    """Which of `size` features a shard has: as even as whole numbers allow."""
    return range(size * rank // num_ranks, size * (rank + 1) // num_ranks)


def head_share(num_heads: int, rank: int, num_ranks: int) -> range:
    """Which of the query heads, or of the key/value heads, a shard has; one for several where there are fewer.

    ValueError unless one of `num_heads` and `num_ranks` divides the other.
    """
    if num_heads % num_ranks and num_ranks % num_heads:
        raise ValueError(f"{num_heads} heads cannot be split over {num_ranks} ranks")
    first = num_heads * rank // num_ranks
    return range(first, first + max(1, num_heads // num_ranks))


def vocabulary_share(vocab_size: int, rank: int, num_ranks: int) -> range:
    """Which tokens a shard embeds and scores: equal shares of the next multiple, the last ones cut short."""
    each = -(-vocab_size // num_ranks)
    return range(min(rank * each, vocab_size), min((rank + 1) * each, vocab_size))
