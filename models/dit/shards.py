"""The shards of a transformer of diffusers: which weights a rank holds, and reading those and no others.

Attention and feed-forward layers are cut as in Megatron-LM (Shoeybi et al., 2019): what leads into the heads or into
the wide middle by its outputs ("columns"), what leads out of them by its inputs ("rows"), and the shards' results are
summed, the bias added after the sum. A gated middle holds values and gates one after the other, and a shard takes its
part of both. Embedders, modulation and the norms of single heads are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.dit.checkpoint import DiTError, fill_dummy_parameter
from models.parallel import Place, even_share
from models.weight_files import WeightsError, weight_files

_INTO_HEADS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_OUT_OF_HEADS = ("to_out.0", "to_add_out")


class SummedLinear(nn.Module):
    """A layer of which every shard has some of the inputs."""

    def __init__(self, linear: Any, place: Place) -> None:
        super().__init__()
        self.weight: Tensor = linear.weight
        self.bias: Tensor | None = linear.bias
        self._place = place

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if y.numel():
            self._place.sum_(y)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's share of one weight."""

    shape: torch.Size
    """The whole weight's."""
    dim: int = 0
    ranges: tuple[range, ...] = ()
    """Along `dim`, to be put side by side; none: all of it."""

    @property
    def own_shape(self) -> list[int]:
        shape = list(self.shape)
        if self.ranges:
            shape[self.dim] = sum(map(len, self.ranges))
        return shape

    def of(self, source: Any) -> Tensor:
        """The share of a tensor, or of a tensor in a file (what `get_slice` of safetensors returns)."""
        if not self.ranges:
            whole: Tensor = source[:]
            return whole
        before = (slice(None),) * self.dim
        return torch.cat([source[(*before, slice(part.start, part.stop))] for part in self.ranges], self.dim)


def cut_layers(transformer: nn.Module, place: Place) -> dict[str, Cut]:
    """Make the layers of a transformer on the meta device those of one shard. Name → share, of every weight it has.

    Raises DiTError for what cannot be cut.
    """
    cuts = {name: Cut(tensor.shape) for name, tensor in transformer.state_dict().items()}
    if place.tensor_size == 1:
        return cuts
    outputs, inputs = [], []
    for name, module in transformer.named_modules():
        if isinstance(module, Attention):
            _give_heads(name, module, place)
            outputs += [(f"{name}.{layer}", 1) for layer in _INTO_HEADS if _has(module, layer)]
            inputs += [f"{name}.{layer}" for layer in _OUT_OF_HEADS if _has(module, layer)]
        elif isinstance(module, FeedForward):
            outputs.append((f"{name}.net.0.proj", 2 if isinstance(module.net[0], (GEGLU, SwiGLU)) else 1))
            inputs.append(f"{name}.net.2")
    for name, num_parts in outputs:
        ranges = _ranges(name, cuts[f"{name}.weight"].shape[0], num_parts, place)
        _cut(transformer, cuts, f"{name}.weight", 0, ranges)
        if f"{name}.bias" in cuts:
            _cut(transformer, cuts, f"{name}.bias", 0, ranges)
    for name in inputs:
        _cut(transformer, cuts, f"{name}.weight", 1, _ranges(name, cuts[f"{name}.weight"].shape[1], 1, place))
        transformer.set_submodule(name, SummedLinear(transformer.get_submodule(name), place))
    return cuts


def fill_from_files(transformer: nn.Module, cuts: dict[str, Cut], folder: Path) -> int:
    """Read this rank's shares into the weights. Bytes read. Raises DiTError."""
    targets = transformer.state_dict()
    num_bytes = 0
    try:
        for file in weight_files(folder, "diffusion_pytorch_model"):
            with safe_open(file, framework="pt") as tensors:
                for name in set(tensors.keys()) & set(targets):
                    source = tensors.get_slice(name)
                    if tuple(source.get_shape()) != tuple(cuts[name].shape):
                        raise DiTError(
                            f"{file} holds {name} as {source.get_shape()}, the config asks for "
                            f"{list(cuts[name].shape)}; the weights do not belong to this config.json"
                        )
                    share = cuts[name].of(source)
                    targets.pop(name).copy_(share)
                    num_bytes += share.nbytes
    except WeightsError as error:
        raise DiTError(str(error)) from error
    except SafetensorError as error:
        raise DiTError(f"{folder} cannot be read as safetensors ({error}); download it again") from error
    if targets:
        more = f" and {len(targets) - 3} more" if len(targets) > 3 else ""
        raise DiTError(
            f"{folder} lacks {', '.join(sorted(targets)[:3])}{more}; its weights do not belong to its config.json"
        )
    return num_bytes


def fill_dummy(transformer: nn.Module, cuts: dict[str, Cut]) -> None:
    """This rank's shares of the random weights that one rank would have."""
    generator = None
    for name, parameter in transformer.named_parameters():
        generator = generator or torch.Generator(parameter.device).manual_seed(0)
        whole = torch.empty(cuts[name].shape, device=parameter.device)
        fill_dummy_parameter(name, whole, generator)
        parameter.data.copy_(cuts[name].of(whole))


def _give_heads(name: str, attention: Any, place: Place) -> None:
    """This shard's number of heads. What a norm over all heads would need is on other ranks."""
    width = attention.inner_dim // attention.heads
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        weight = getattr(getattr(attention, norm, None), "weight", None)
        if weight is not None and weight.numel() != width:
            raise DiTError(
                f"{name}.{norm} of the transformer goes over all heads, which tensor_parallel_size "
                f"{place.tensor_size} would part; use cfg_parallel_size or ulysses_degree"
            )
    if attention.heads % place.tensor_size:
        raise DiTError(
            f"{name} has {attention.heads} heads, which tensor_parallel_size {place.tensor_size} cannot share"
        )
    attention.heads //= place.tensor_size


def _has(module: nn.Module, layer: str) -> bool:
    """Whether it is there: an attention without text names its layers and leaves them None."""
    for part in layer.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return isinstance(module, nn.Linear)


def _ranges(name: str, size: int, num_parts: int, place: Place) -> tuple[range, ...]:
    """A shard's share of every part of `size` features."""
    each = size // num_parts
    if each % place.tensor_size:
        raise DiTError(
            f"{name} of the transformer is {each} wide, which tensor_parallel_size {place.tensor_size} does not divide"
        )
    own = even_share(each, place.tensor_rank, place.tensor_size)
    return tuple(range(part * each + own.start, part * each + own.stop) for part in range(num_parts))


def _cut(transformer: nn.Module, cuts: dict[str, Cut], name: str, dim: int, ranges: tuple[range, ...]) -> None:
    cuts[name] = Cut(cuts[name].shape, dim, ranges)
    layer, _, weight = name.rpartition(".")
    setattr(transformer.get_submodule(layer), weight, nn.Parameter(torch.empty(cuts[name].own_shape, device="meta")))
