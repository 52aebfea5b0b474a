"""A transformers model cut over the shards of a stage, by the plan that transformers ships with its class.

The plan says of every module how its weight lies over the ranks ("colwise": output features are split, "rowwise": input
features are). It is followed here with plain modules over this rank's part, without transformers' device mesh. Two
differences: key/value heads are held by several ranks where there are fewer of them than ranks, and what a plan says
of experts is left out: they are whole on every rank.

Legend: T tokens, D input features, E output features.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from models.parallel import Place, even_share, head_share, vocabulary_share
from models.text.base import DecoderSpec, ModelError

_WHOLE = ("replicate", "replicated_with_grad_allreduce", "moe_tp_experts")


def apply_plan(model: PreTrainedModel, spec: DecoderSpec, place: Place) -> bool:
    """Replace the modules that the plan names by this rank's part of them. False when the class ships no plan.

    Raises ModelError, with the module's name, for a way of cutting that is not computed here.
    """
    plan = dict(model._tp_plan or {})
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, module in modules.items():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or style in _WHOLE or name in parameters:
            continue
        own = _cut(module, style, name.rpartition(".")[2], spec, place)
        if own is None:
            raise ModelError(
                f"tensor_parallel_size is {place.tensor_size}, but the plan of {type(model).__name__} cuts {name} "
                f"({type(module).__name__}) by {style!r}, which is not computed here; give 1"
            )
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, own)
    return bool(plan)


def _cut(module: nn.Module, style: str, name: str, spec: DecoderSpec, place: Place) -> nn.Module | None:
    """This rank's part of `module`; None where it is none of those known."""
    rank, num_ranks = place.tensor_rank, place.tensor_size
    if isinstance(module, nn.Embedding) and style == "embedding_rowwise":
        return _Embedding(module, place)
    if type(module) is not nn.Linear:
        return None
    if style in ("colwise_gather_output", "colwise_rep"):
        return _GatheredColumns(module, place)
    if style == "colwise":
        rows = even_share(module.out_features, rank, num_ranks)
        if name in ("k_proj", "v_proj") and module.out_features == spec.num_kv_heads * spec.head_dim:
            heads = head_share(spec.num_kv_heads, rank, num_ranks)
            rows = range(heads.start * spec.head_dim, heads.stop * spec.head_dim)
        return _linear(module.weight[rows.start : rows.stop], module.bias, rows)
    if style in ("rowwise", "rowwise_split_input", "rowwise_rep"):
        return _SummedRows(module, place, takes_whole=style != "rowwise")
    return None


def _linear(weight_ED: torch.Tensor, bias: torch.Tensor | None, rows: range) -> nn.Linear:
    """A linear layer over a copy of `weight_ED`, with those elements of the bias."""
    own = nn.Linear(weight_ED.shape[1], weight_ED.shape[0], bias=bias is not None, device="meta")
    own.weight = nn.Parameter(weight_ED.detach().clone(), requires_grad=False)
    if bias is not None:
        own.bias = nn.Parameter(bias.detach()[rows.start : rows.stop].clone(), requires_grad=False)
    return own


class _GatheredColumns(nn.Module):
    """Output features split for the product, and whole again after it. They need not divide evenly."""

    def __init__(self, whole: nn.Linear, place: Place):
        super().__init__()
        self.out_features, self._place = whole.out_features, place
        rows = vocabulary_share(whole.out_features, place.tensor_rank, place.tensor_size)
        self._missing = -(-whole.out_features // place.tensor_size) - len(rows)
        own = _linear(whole.weight[rows.start : rows.stop], whole.bias, rows)
        self.weight, self.bias = own.weight, own.bias

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TE = F.linear(x_TD, self.weight, self.bias)
        if self._missing:
            out_TE = F.pad(out_TE, (0, self._missing))
        return self._place.gather(out_TE, -1)[..., : self.out_features]


class _SummedRows(nn.Module):
    """Input features split, the products added; the bias is the first rank's."""

    def __init__(self, whole: nn.Linear, place: Place, *, takes_whole: bool):
        super().__init__()
        self._place, self._takes_whole = place, takes_whole
        self._columns = even_share(whole.in_features, place.tensor_rank, place.tensor_size)
        own = _linear(
            whole.weight[:, self._columns.start : self._columns.stop],
            whole.bias if place.tensor_rank == 0 else None,
            range(whole.out_features),
        )
        self.weight, self.bias = own.weight, own.bias

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self._takes_whole:
            x_TD = x_TD[..., self._columns.start : self._columns.stop]
        return self._place.sum_(F.linear(x_TD, self.weight, self.bias).contiguous())


class _Embedding(nn.Module):
    """The vocabulary split: a token's row comes from the rank that has it, by a sum in which the others give zeros."""

    def __init__(self, whole: nn.Embedding, place: Place):
        super().__init__()
        self._place, self._own = place, whole
        self._tokens = vocabulary_share(whole.num_embeddings, place.tensor_rank, place.tensor_size)
        own = whole.weight.detach()[self._tokens.start : self._tokens.stop]
        # One row where a rank has no token, so that there is something to look up.
        whole.weight = nn.Parameter((own if len(own) else whole.weight.detach()[:1]).clone(), requires_grad=False)
        whole.padding_idx = None

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        own = token_ids - self._tokens.start
        is_foreign = (own < 0) | (own >= len(self._tokens))
        x = self._own(own.masked_fill(is_foreign, 0))  # a subclass may scale what it finds (Gemma)
        return self._place.sum_(x.masked_fill(is_foreign.unsqueeze(-1), 0))
