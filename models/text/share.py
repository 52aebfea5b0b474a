"""What one rank holds of a dense decoder: which layers, heads, features and tokens.

Queries and keys are cut by whole heads, a key/value head held by several ranks where there are fewer of them than
ranks; feed-forward features as evenly as they come, the vocabulary in equal shares of which the last is cut short.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.parallel import ALONE, Place, even_share, head_share, layer_range, vocabulary_share
from models.text.architecture import DenseArchitecture
from models.text.base import DecoderSpec, ModelError


@dataclass(frozen=True, slots=True)
class Share:
    """Ranges of the whole model's indexes."""

    layers: range
    heads: range
    kv_heads: range
    inner: range
    """Features between the two halves of a feed-forward."""
    tokens: range
    """Of the vocabulary, for the embedding and the head."""

    @classmethod
    def of(cls, architecture: DenseArchitecture, place: Place = ALONE) -> Share:
        """Raises ModelError when `place` is of a grid that the model cannot be cut into."""
        spec, rank, num_ranks = architecture.spec, place.tensor_rank, place.tensor_size
        check_split(spec, place)
        return cls(
            layers=layer_range(spec.num_layers, place.stage, place.num_stages),
            heads=head_share(spec.num_heads, rank, num_ranks),
            kv_heads=head_share(spec.num_kv_heads, rank, num_ranks),
            inner=even_share(architecture.intermediate_size, rank, num_ranks),
            tokens=vocabulary_share(spec.vocab_size, rank, num_ranks),
        )


def check_split(spec: DecoderSpec, place: Place) -> None:
    """Raise ModelError unless every stage gets a layer and every shard the same number of heads."""
    if place.num_stages > spec.num_layers:
        raise ModelError(
            f"pipeline_parallel_size is {place.num_stages}, but {spec.architecture} has {spec.num_layers} layers; "
            f"give at most that many stages"
        )
    sizes = [
        size
        for size in range(1, spec.num_heads + 1)
        if spec.num_heads % size == 0 and (spec.num_kv_heads % size == 0 or size % spec.num_kv_heads == 0)
    ]
    if place.tensor_size not in sizes:
        raise ModelError(
            f"tensor_parallel_size is {place.tensor_size}, but {spec.architecture} has {spec.num_heads} query heads "
            f"and {spec.num_kv_heads} key/value heads, of which every rank needs as many as the others; sizes that "
            f"work are {', '.join(map(str, sizes))}"
        )
