"""What `quantization_config` in a checkpoint's config.json says: which matrices are stored in which format.

Read are `fp8` (transformers' block-scaled form, of DeepSeek and Qwen3, and AutoFP8's) and `compressed-tensors` (fp8,
int8, and packed int4 and int8). Scales of activations that a calibration left are not used: activations are scaled by
their own greatest, which is never coarser. So `static` and `dynamic` load alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.quantized.formats import Format, PackedFormat, PlainFormat
from models.quantized.scheme import Scheme
from models.text.base import ModelError

READ = "fp8 (per tensor or in blocks) and compressed-tensors (fp8, int8, packed int4 or int8)"


@dataclass(frozen=True, slots=True)
class Rule:
    """Of the matrices whose name `matches`."""

    matches: Callable[[str], bool]
    scheme: Scheme
    format: Format


def read_rules(config: dict[str, Any]) -> tuple[Rule, ...]:
    """The rules of a `quantization_config`; of a matrix the first that matches holds. Raises ModelError."""
    method = config.get("quant_method")
    if method == "fp8":
        return (_read_fp8(config),)
    if method == "compressed-tensors":
        return _read_compressed_tensors(config)
    raise ModelError(
        f"quantization_config.quant_method is {method!r}; computed here are {READ}: use such a checkpoint, or the "
        f"unquantised one with the option quantization"
    )


def _read_fp8(config: dict[str, Any]) -> Rule:
    for key, value, usual in (
        ("fmt", config.get("fmt") or "e4m3", "e4m3"),
        ("activation_scheme", config.get("activation_scheme") or "dynamic", "dynamic or static"),
    ):
        if value not in usual.split(" or "):
            raise ModelError(f"quantization_config.{key} is {value!r}; computed here is {usual}")
    skipped = tuple(config.get("modules_to_not_convert") or config.get("ignored_layers") or ())

    def matches(name: str) -> bool:
        # transformers' own rule: a pattern names a module, one above it, or the end of its name.
        return not any(re.match(rf"(?:{each})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(each) for each in skipped)

    block = config.get("weight_block_size")
    if block is None:
        return Rule(matches, Scheme("fp8"), PlainFormat("weight_scale", (None, None)))
    tall, wide = _read_block(block, "weight_block_size")
    return Rule(matches, Scheme("fp8", group=wide), PlainFormat("weight_scale_inv", (tall, wide)))


def _read_compressed_tensors(config: dict[str, Any]) -> tuple[Rule, ...]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError(f"quantization_config.config_groups is {groups!r}; an object with a group is needed")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ModelError("quantization_config.sparsity_config: sparse weights are not computed; use a dense checkpoint")
    ignored = tuple(config.get("ignore") or ())
    rules = []
    for name, group in groups.items():
        try:
            targets = tuple(group.get("targets") or ())
            scheme, format = _read_group(group, group.get("format") or config.get("format"))
        except (ModelError, AttributeError, TypeError) as error:
            raise ModelError(f"quantization_config.config_groups.{name}: {error}; computed here are {READ}") from None
        rules.append(Rule(_selects(targets, ignored), scheme, format))
    return tuple(rules)


def _selects(targets: tuple[str, ...], ignored: tuple[str, ...]) -> Callable[[str], bool]:
    """Targets are classes (all matrices are `Linear`), names, or patterns that begin with re: ."""

    def names(given: tuple[str, ...], name: str) -> bool:
        return any(re.match(each[3:], name) if each.startswith("re:") else each in (name, "Linear") for each in given)

    return lambda name: names(targets, name) and not names(ignored, name)


def _read_group(group: dict[str, Any], format: str | None) -> tuple[Scheme, Format]:
    weights = group["weights"] if group.get("weights") else {}
    kind, bits = str(weights.get("type", "int")), weights.get("num_bits", 8)
    strategy, is_symmetric = weights.get("strategy"), weights.get("symmetric", True)
    size = weights.get("group_size")
    strategy = strategy or ("group" if size and size > 0 else "channel" if size == -1 else "tensor")
    told = f"weights of {kind} with {bits} bits, strategy {strategy}, {'' if is_symmetric else 'a'}symmetric"
    if weights.get("actorder") in ("group", True):
        raise ModelError(f"{told}, with columns in the order of activations (actorder {weights['actorder']!r})")
    is_packed = format == "pack-quantized" and kind == "int" and bits in (4, 8) and strategy in ("group", "channel")
    if is_packed and (is_symmetric or bits == 4):
        grouped = size if strategy == "group" else None
        return Scheme("int4" if bits == 4 else "int8", grouped, has_zero=not is_symmetric), PackedFormat()
    plain = {"float-quantized": "float", "int-quantized": "int", "naive-quantized": kind}
    blocks: dict[str, tuple[int | None, int | None]] = {"tensor": (None, None), "channel": (1, None)}
    if strategy == "block":
        blocks["block"] = _read_block(weights.get("block_structure"), "block_structure")
    elif strategy == "group":
        blocks["group"] = (1, size)
    if format is not None and plain.get(format) == kind and bits == 8 and is_symmetric and strategy in blocks:
        block = blocks[strategy]
        return Scheme("fp8" if kind == "float" else "int8", block[1]), PlainFormat("weight_scale", block)
    raise ModelError(f"{told}, in the format {format!r}, is not read")


def _read_block(value: Any, key: str) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise ModelError(f"{key} is {value!r}; two whole numbers are needed, as [128, 128]")
    return value[0], value[1]
