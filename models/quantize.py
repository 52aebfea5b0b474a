"""Which matrices of a model are quantised, and how: by the option `quantization` as they are loaded, or by a checkpoint
that is quantised already. What computes with them is in `models/quantized`.

The matrices of every decoder layer are, as is usual; embeddings, norms, biases and the head are not: they are a small
part of the bytes read for a token and the most sensitive one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.layers import GatedLinear, Linear
from models.quantized.checkpoint import Rule, read_rules
from models.quantized.formats import FloatFormat
from models.quantized.linear import QuantizedGated, QuantizedLinear
from models.quantized.product import is_computed
from models.quantized.scheme import ON_LOAD, Scheme
from models.text.base import ModelError

log = logging.getLogger(__name__)

PARTS = (*(f"self_attn.{part}" for part in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
"""A layer's matrices, without the `_proj` that their names end in."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the matrices of a decoder's layers are made of. Without rules they are as the checkpoint has them."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, config: dict[str, Any], word: str | None, *, load_format: str = "auto") -> Quantization:
        """For the checkpoint of this `config.json` and the value of the option. Raises ModelError.

        Random weights ("dummy") are quantised on load in the scheme that the checkpoint would have.
        """
        stored = config.get("quantization_config")
        if stored is None:
            return cls() if word is None else cls((Rule(lambda name: True, ON_LOAD[word], FloatFormat()),))
        rules = read_rules(stored)
        kinds = sorted({rule.scheme.values for rule in rules})
        if word is not None and kinds != [word]:
            raise ModelError(
                f"quantization is {word!r}, but the checkpoint is quantised already, as {' and '.join(kinds)} "
                f"({stored.get('quant_method')}); leave it out, or use the unquantised checkpoint"
            )
        if load_format == "dummy":
            rules = tuple(Rule(rule.matches, _from_floats(rule.scheme), FloatFormat()) for rule in rules)
        return cls(rules)

    def only_scheme(self, num_layers: int) -> Scheme | None:
        """Of all matrices of a decoder's layers; None where none is quantised. Raises ModelError when they differ."""
        names = [f"model.layers.{index}.{part}_proj" for index in range(num_layers) for part in PARTS]
        schemes = {None if rule is None else rule.scheme for rule in map(self._find, names)}
        if len(schemes) > 1:
            raise ModelError("quantization_config stores the layers' matrices in different forms, not reckoned as one")
        return schemes.pop()

    def check(self, dtype: torch.dtype, device: torch.device, *, is_asked: bool) -> None:
        """Raise ModelError when the option asks for what `device` has no kernel for. A checkpoint's is dequantised."""
        for scheme in {rule.scheme for rule in self.rules}:
            if is_computed(scheme, dtype, device):
                continue
            if is_asked:
                remedy = [word for word, other in ON_LOAD.items() if is_computed(other, dtype, device)]
                raise ModelError(
                    f"quantization is {scheme.values!r}, which {_named(device)} has no kernel for; "
                    + (f"use {' or '.join(map(repr, remedy))}" if remedy else "leave it out")
                )
            log.warning(
                "matrices in %s are held as %s: %s has no kernel for them",
                *(scheme, str(dtype).removeprefix("torch."), _named(device)),
            )

    def linear(
        self,
        in_features: int,
        parts: Sequence[tuple[str, int]],
        *,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Linear | QuantizedLinear:
        """A layer's matrix, of one or several of the checkpoint. Raises ModelError when these differ in scheme."""
        rule = self._rule([prefix for prefix, _ in parts])
        if rule is None:
            return Linear(in_features, parts, has_bias=has_bias, dtype=dtype, device=device)
        scheme = _fitted(rule, in_features, parts[0][0])
        return QuantizedLinear(
            in_features, parts, scheme, rule.format, has_bias=has_bias, dtype=dtype, device=device
        )  # fmt: skip

    def gated(
        self,
        in_features: int,
        gate: tuple[str, int],
        up: tuple[str, int],
        *,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> GatedLinear | QuantizedGated:
        """The first half of a feed-forward."""
        if self._rule([gate[0], up[0]]) is None:
            return GatedLinear(in_features, gate, up, has_bias=has_bias, dtype=dtype, device=device)
        merged = self.linear(in_features, [gate, up], has_bias=has_bias, dtype=dtype, device=device)
        assert isinstance(merged, QuantizedLinear)
        return QuantizedGated(merged, device)

    def _rule(self, names: list[str]) -> Rule | None:
        found = [self._find(name) for name in names]
        if any(rule is not found[0] for rule in found):
            raise ModelError(
                f"quantization_config stores {', '.join(names)} in different forms, which are computed as one matrix "
                f"here; quantise them alike"
            )
        return found[0]

    def _find(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(name)), None)


def _fitted(rule: Rule, in_features: int, name: str) -> Scheme:
    """The scheme for a row of so many features."""
    scheme = rule.scheme.fitted(in_features) if isinstance(rule.format, FloatFormat) else rule.scheme
    if scheme.group is not None and in_features % scheme.group:
        raise ModelError(
            f"{name} has {in_features} input features here, which groups of {scheme.group} that share a scale do not "
            f"divide; choose another tensor_parallel_size or quantization"
        )
    return scheme


def _from_floats(scheme: Scheme) -> Scheme:
    return replace(scheme, has_zero=scheme.values == "int4")


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return "a CPU" if device.type == "cpu" else device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (capability {major}.{minor})"


FLOAT = Quantization()
"""Nothing quantised."""
