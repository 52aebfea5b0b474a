"""Which part of a denoise step a rank computes: which rows, which of their tokens, which heads of every layer.

    rank = (row part * tokens + token part) * tensor + shard          rank 0 is the driver

Rows (a prompt, its negative, batch mates) need nothing of each other, so `rows` groups of ranks take them in turn and
only the results are gathered. Within such a group the tokens of every row lie on `tokens` ranks, which exchange tokens
for heads around each attention (DeepSpeed-Ulysses, Jacobs et al., 2023), and every layer is cut into `tensor` shards
(Megatron-LM, Shoeybi et al., 2019). The three know nothing of each other, so all their products work. Shares are as
even as whole numbers allow and may be empty.

torch is imported where tensors move and nowhere else, so that a split can be checked before anything loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.parallel import ALONE, Place, even_share

if TYPE_CHECKING:
    from torch import Tensor

# Legend: R rows, S own and T all tokens, N all and M own heads, H head dimension, D any width


@dataclass(frozen=True, slots=True)
class Split:
    """Over how many ranks each kind of work is spread."""

    tensor: int = 1
    rows: int = 1
    tokens: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.rows * self.tokens

    def check(self, num_heads: int) -> None:
        """Raises ValueError with the sizes that would work for a transformer of `num_heads` heads."""
        if num_heads % self.tensor:
            raise ValueError(
                f"tensor_parallel_size is {self.tensor}, which does not divide the {num_heads} attention heads of the "
                f"transformer; sizes that do are {_divisors(num_heads)}"
            )
        left = num_heads // self.tensor
        if left % self.tokens:
            shards = f" that tensor_parallel_size {self.tensor} leaves a rank" if self.tensor > 1 else ""
            raise ValueError(
                f"ulysses_degree is {self.tokens}, which does not divide the {left} attention heads{shards}; "
                f"sizes that do are {_divisors(left)}"
            )


@dataclass(frozen=True, slots=True)
class Grid:
    """One rank's place in a split, and the process groups it talks in. All ranks make the same calls in order."""

    split: Split = Split()
    rank: int = 0
    shards: Place = ALONE
    world: Any = None
    mates: Any = None
    """The ranks with the other tokens of the same rows."""
    leads: Any = None
    """The first rank of every row part; None on others."""

    @classmethod
    def join(cls, split: Split, rank: int) -> Grid:
        """torch.distributed must be initialised with `split.num_ranks` ranks; all of them make this call."""
        from torch import distributed

        ranks = range(split.num_ranks)
        per_row = split.tensor * split.tokens
        shards = _group_of(rank, [ranks[first : first + split.tensor] for first in ranks[:: split.tensor]])
        token_groups = [ranks[first + shard : first + per_row : split.tensor] for first in ranks[::per_row]
                        for shard in range(split.tensor)]  # fmt: skip
        return cls(
            split,
            rank,
            Place(rank % split.tensor, split.tensor, tensor_group=shards),
            distributed.group.WORLD,
            _group_of(rank, token_groups),
            _group_of(rank, [ranks[::per_row]]),
        )

    @property
    def row_part(self) -> int:
        return self.rank // (self.split.tensor * self.split.tokens)

    @property
    def token_part(self) -> int:
        return self.rank // self.split.tensor % self.split.tokens

    @property
    def is_lead(self) -> bool:
        """Whether this rank has the results of its rows."""
        return self.rank % (self.split.tensor * self.split.tokens) == 0

    def rows(self, num_rows: int) -> range:
        """This rank's."""
        return even_share(num_rows, self.row_part, self.split.rows)

    def tokens(self, num_tokens: int) -> range:
        """This rank's, of the image or of the text."""
        return even_share(num_tokens, self.token_part, self.split.tokens)

    def token_counts(self, num_tokens: int) -> list[int]:
        """How many each rank with tokens of the same rows has."""
        return [len(even_share(num_tokens, part, self.split.tokens)) for part in range(self.split.tokens)]

    def broadcast_(self, x: Tensor) -> Tensor:
        """`x`, which now holds what it holds on the driver."""
        if x.numel():
            self.world.broadcast(x, 0).wait()
        return x

    def to_heads(self, x_RSNH: Tensor, counts: list[int]) -> Tensor:
        """Give the heads of others away for the tokens of others: (R, T, M, H), tokens part by part.

        `counts`: tokens of every part.
        """
        num_rows, length, num_heads, width = x_RSNH.shape
        own = num_heads // self.split.tokens
        each = num_rows * own * width
        sent = x_RSNH.view(num_rows, length, -1, own, width).movedim(2, 0).contiguous()
        received = x_RSNH.new_empty(sum(counts) * each)
        sizes = [count * each for count in counts]
        self.mates.alltoall_base(received, sent.view(-1), sizes, [length * each] * self.split.tokens).wait()
        parts = received.split(sizes)
        return _joined([part.view(num_rows, count, own, width) for part, count in zip(parts, counts)], 1)

    def to_tokens(self, x_RTMH: Tensor, counts: list[int]) -> Tensor:
        """The way back: (R, S, N, H)."""
        num_rows, _, own, width = x_RTMH.shape
        length = counts[self.token_part]
        each = num_rows * own * width
        sent = _joined([part.reshape(-1) for part in x_RTMH.split(counts, 1)], 0)
        received = x_RTMH.new_empty(self.split.tokens, num_rows, length, own, width)
        sizes = [count * each for count in counts]
        self.mates.alltoall_base(received.view(-1), sent, [length * each] * self.split.tokens, sizes).wait()
        return received.movedim(0, 2).reshape(num_rows, length, self.split.tokens * own, width)

    def gather_tokens(self, x_RSD: Tensor, num_tokens: int) -> Tensor:
        """All tokens of the rows (R, T, D) on the rank with the first of them; elsewhere zeros in their place."""
        counts = self.token_counts(num_tokens)
        num_rows, _, width = x_RSD.shape
        sizes = [count * num_rows * width for count in counts]
        parts = _gather(self.mates, self.token_part, x_RSD, sizes)
        if parts is None:
            return x_RSD.new_zeros(num_rows, num_tokens, width)
        return _joined([part.view(num_rows, count, width) for part, count in zip(parts, counts)], 1)

    def gather_rows(self, x_R: Tensor, num_rows: int) -> Tensor | None:
        """All rows on the driver; None elsewhere. `x_R`: this rank's rows, of any further dimensions."""
        if self.split.rows == 1 or not self.is_lead:
            return x_R if self.rank == 0 else None
        shape = x_R.shape[1:]
        each = shape.numel()
        counts = [len(even_share(num_rows, part, self.split.rows)) for part in range(self.split.rows)]
        parts = _gather(self.leads, self.row_part, x_R, [count * each for count in counts])
        return None if parts is None else _joined([part.view(-1, *shape) for part in parts], 0)


def _gather(group: Any, part: int, x: Tensor, sizes: list[int]) -> list[Tensor] | None:
    """Everybody's `x`, flat, on the first of the group. An exchange in which only the first receives, as a gather of
    unequal sizes is in neither gloo nor NCCL."""
    nothing = [0] * len(sizes)
    received = x.new_empty(0 if part else sum(sizes))
    group.alltoall_base(received, x.reshape(-1), nothing if part else sizes, [sizes[part], *nothing[1:]]).wait()
    return None if part else list(received.split(sizes))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    import torch

    return torch.cat(parts, dim)


def _group_of(rank: int, members: list[range]) -> Any:
    """The group that `rank` belongs to, if any; none is made for one rank alone, or anew for all of them."""
    from torch import distributed

    if len(members[0]) == 1:
        return None
    if len(members[0]) == distributed.get_world_size():
        return distributed.group.WORLD
    groups = [distributed.new_group(list(ranks)) for ranks in members]
    return next((group for group, ranks in zip(groups, members) if rank in ranks), None)


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
