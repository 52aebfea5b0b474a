"""Any other transformers decoder, on our KV blocks: transformers computes the layers, our backend the attention.

transformers lets a model's attention be replaced by name. The function registered here ignores masks and caches: it
takes the queries, keys and values of all tokens of the step, lying flat in one [1, T] batch, and hands them to the
attention backend of the step, which it finds in a context variable. So one engine step is one forward here too.

A model qualifies when that is the only place where its tokens meet. This is not read off a list but tried when it is
loaded: every layer must attend exactly once, with equal heads for keys and values, and a prompt computed in two pieces
beside a stranger must give what it gives alone. Whatever keeps a state of its own (Mamba, linear attention), biases
its scores (ALiBi, T5) or builds positions by itself fails one of the two, and is refused by name.

Legend: T tokens of the step, N query heads, K key/value heads, H head dimension, D hidden size, R rows.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.attention.base import KVCacheSpec, TokenLayout
from models.attention.sdpa import SdpaAttention
from models.layers import MIN_ROWS
from models.parallel import ALONE, Place
from models.staging import Staging
from models.text.architecture import read_eos
from models.text.base import DecoderSpec, ModelError, StepContext
from models.text.share import check_split
from models.text.tensor_plan import apply_plan
from models.weight_files import weight_files

logger = logging.getLogger(__name__)

_NAME = "tandem_paged"
_HARMLESS = {"dropout", "position_ids", "output_attentions", "use_cache", "cache_position"}
"""Arguments of transformers' attention functions that change nothing for a causal step without dropout."""


class _Heads(NamedTuple):
    """Query heads, key/value heads and head dimension of a layer."""

    num: int
    num_kv: int
    dim: int


@dataclass(slots=True)
class _Step:
    """What the attention function finds in the context variable."""

    context: StepContext
    num_tokens: int
    """Rows beyond are padding."""
    calls: list[tuple[int, _Heads]]
    """(layer, its heads) of every call, for the trial at loading."""


_step: ContextVar[_Step] = ContextVar("tandem_step")


class TransformersDecoder:
    """A `CausalLM` around a transformers model."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        eos_token_ids: tuple[int, ...],
        num_positions: int | None = None,
        place: Place = ALONE,
        num_bytes_read: int = 0,
    ):
        """`model` is the whole; of it the shard of `place` is kept and moved to `device`. `num_positions`: positions
        that will be served; LongRoPE chooses by it. Raises ModelError.
        """
        self._model = model.eval().requires_grad_(False)
        self._name = type(model).__name__
        self._base = model.base_model
        if getattr(model, "_is_stateful", False):
            raise ModelError(f"{self._name} keeps a state beside keys and values; it cannot be served")
        if self._base is model:
            raise ModelError(f"{self._name} has no decoder separate from its head; it cannot be served")
        self._min_rows = MIN_ROWS if device.type == "cpu" else 1
        _fix_frequencies(self._base, num_positions)
        self.num_parameters: int = model.num_parameters()
        movable: nn.Module = model
        if place.is_alone:
            movable.to(device)
        self.spec = self.rank_spec = self._describe(eos_token_ids)
        if not place.is_alone:
            self._cut(place)
            movable.to(device)
            heads = self._measure()
            self.rank_spec = replace(self.spec, num_heads=heads.num, num_kv_heads=heads.num_kv)
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.num_bytes_read = num_bytes_read
        """Of the checkpoint's files: all of them, on every rank."""
        self._given = _Given()
        setattr(model, model.base_model_prefix, self._given)
        self._prove()

    @property
    def caps_scores(self) -> bool:
        """Whether attention squeezes its scores, as Gemma 2 does; not every backend can."""
        return getattr(self._model.config.get_text_config(), "attn_logit_softcapping", None) is not None

    @torch.inference_mode()
    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, context: StepContext) -> torch.Tensor:
        return self._run(token_ids_T, positions_T, _Step(context, token_ids_T.shape[0], []))

    @torch.inference_mode()
    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        num_rows = hidden_RD.shape[0]
        if num_rows < self._min_rows:
            hidden_RD = F.pad(hidden_RD, (0, 0, 0, self._min_rows - num_rows))
        # The whole model with its decoder replaced by what the decoder gave: scaling and capping of logits is the
        # model's own business, after the head.
        self._given.hidden = hidden_RD.unsqueeze(0)
        ids = torch.zeros(1, hidden_RD.shape[0], dtype=torch.int64, device=hidden_RD.device)
        logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        self._given.hidden = None
        return logits[0, :num_rows].float()

    def _run(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: _Step) -> torch.Tensor:
        missing = max(0, self._min_rows - step.num_tokens)
        ids, positions = F.pad(token_ids_T, (0, missing)), F.pad(positions_T, (0, missing))
        token = _step.set(step)
        try:
            output = self._base(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        finally:
            _step.reset(token)
        hidden_TD: torch.Tensor = output.last_hidden_state[0]
        return hidden_TD[: step.num_tokens]

    def _cut(self, place: Place) -> None:
        check_split(self.spec, place)
        if not apply_plan(self._model, self.spec, place) and place.tensor_rank == 0:
            logger.warning(
                "%s has no plan for tensor_parallel_size %d: every rank holds and computes all of it",
                self._name, place.tensor_size,
            )  # fmt: skip

    def _describe(self, eos_token_ids: tuple[int, ...]) -> DecoderSpec:
        """The geometry of the whole model."""
        config, heads = self._model.config.get_text_config(), self._measure()
        longest = getattr(config, "max_position_embeddings", None)
        if longest is None:
            raise ModelError(f"the config of {self._name} gives no max_position_embeddings; it cannot be served")
        return DecoderSpec(
            architecture=self._name,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=heads.num_kv,
            head_dim=heads.dim,
            vocab_size=config.vocab_size,
            max_positions=longest,
            eos_token_ids=eos_token_ids,
            dtype=self._model.dtype,
        )

    @torch.inference_mode()
    def _measure(self) -> _Heads:
        """The heads of every layer, from the calls of a forward whose attention is left out."""
        config = self._model.config.get_text_config()
        device = self._model.device
        step = _Step(StepContext(_Skipped(), None, []), MIN_ROWS, [])
        positions_T = torch.arange(MIN_ROWS, device=device)
        self._run(torch.zeros_like(positions_T), positions_T, step)
        layers = [layer for layer, _ in step.calls]
        shapes = {heads for _, heads in step.calls}
        if layers != list(range(config.num_hidden_layers)) or len(shapes) != 1:
            raise ModelError(
                f"{self._name} does not attend once in each of its {config.num_hidden_layers} layers with heads of one "
                f"shape (it did in {layers}, with {sorted(map(tuple, shapes))}); it needs more than KV blocks and "
                f"cannot be served"
            )
        return shapes.pop()

    def _prove(self) -> None:
        """Compute a prompt alone and at once, then in two pieces with a stranger first: the results must agree."""
        spec, device = self.rank_spec, self._model.device
        cache_spec = KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, 4, spec.dtype, device)
        attention = SdpaAttention(cache_spec, spec.num_heads)
        cache = attention.allocate(7)
        staging = Staging(device)
        prompt = [index * 7919 % spec.vocab_size for index in range(1, 9)]

        def compute(ids: list[int], positions: list[int], layout: TokenLayout) -> torch.Tensor:
            context = StepContext(attention, attention.plan(layout, staging), cache)
            staging.send()
            return self.forward(torch.tensor(ids, device=device), torch.tensor(positions, device=device), context)

        alone = compute(prompt, list(range(8)), TokenLayout([8], [0], [[0, 1]]))
        compute(prompt[:5], list(range(5)), TokenLayout([5], [0], [[2, 3]]))
        stranger = [3, 1, 2]
        layout = TokenLayout([3, 3], [0, 5], [[4], [2, 3]])
        mixed = compute(stranger + prompt[5:], [0, 1, 2, 5, 6, 7], layout)[3:]
        error = (mixed - alone[5:]).float().norm() / alone[5:].float().norm()
        # Rounding: 1e-6 in float32, some 1e-2 through many layers of bfloat16. A missing history is of order one.
        if not error < (1e-3 if spec.dtype == torch.float32 else 1e-1):
            raise ModelError(
                f"{self._name} computes another result when a prompt is cut or batched (relative difference "
                f"{error:.2g}); it keeps a state beside the KV blocks and cannot be served"
            )


def load_transformers(
    folder: Path,
    config: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    load_format: str,
    max_model_len: int | None,
    place: Place = ALONE,
) -> TransformersDecoder:
    """The model in `folder` as transformers builds it; never code from the folder. Raises ModelError.

    A rank reads all of it into the memory of its host and moves its shard to its device.
    """
    _require_causal_lm(config)
    if place.num_stages > 1:
        raise ModelError(
            f"pipeline_parallel_size is {place.num_stages}, but the layers of {config['architectures'][0]} are run by "
            f"transformers, which cannot start or stop between two of them; use tensor_parallel_size"
        )
    AttentionInterface.register(_NAME, _attend)
    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        wanted = dtype or parsed.dtype or torch.float32
        if load_format == "dummy":
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(parsed, dtype=wanted, attn_implementation=_NAME)
            missing: list[str] = []
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=parsed,
                dtype=wanted,
                attn_implementation=_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            model, report = loaded
            missing = sorted(report["missing_keys"])
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"transformers cannot load {folder} ({config['architectures'][0]}): {reason}") from error
    if missing:  # transformers fills them with random numbers
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}, {missing[0]!r} for one; "
            f"download the whole checkpoint of a causal language model"
        )
    return TransformersDecoder(
        model,
        device=device,
        eos_token_ids=read_eos(config),
        num_positions=max_model_len,
        place=place,
        num_bytes_read=0 if load_format == "dummy" else sum(file.stat().st_size for file in weight_files(folder)),
    )


def _require_causal_lm(config: dict[str, Any]) -> None:
    """Raise ModelError unless the checkpoint is of a class that generates text and that transformers knows.

    transformers itself would build the model type's decoder around whatever weights there are, an encoder's say.
    """
    architecture, kind = config["architectures"][0], config.get("model_type") or ""
    if kind not in CONFIG_MAPPING_NAMES:
        remedy = (
            "it comes with Python code of its own (auto_map), which is never run"
            if "auto_map" in config
            else "upgrade transformers if the model is newer, or correct model_type in config.json"
        )
        raise ModelError(
            f"{architecture} has the model_type {kind!r}, which transformers {transformers.__version__} does not "
            f"know; {remedy}"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if known is None or (architecture != known and not architecture.endswith("ForCausalLM")):
        raise ModelError(
            f"{architecture} does not generate text token by token; "
            f"give a checkpoint of {known or 'an architecture that ends in ForCausalLM'}"
        )


class _Given(nn.Module):
    """Stands where the decoder was, and gives the hidden states it is told."""

    hidden: torch.Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


class _Skipped:
    """Attention left out, for a forward that only shows which calls are made."""

    def allocate(self, num_blocks: int) -> list[Any]:
        return []

    def plan(self, layout: TokenLayout, staging: Staging) -> None:
        return None

    def attend(self, q_TNH: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return q_TNH

    def copy_blocks(self, kv: list[Any], sources: torch.Tensor, targets: torch.Tensor) -> None:
        pass


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: tensors come as [1, heads, T, H], and go back as [1, T, heads, H]."""
    step = _step.get()
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _HARMLESS)
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelError(
            f"{type(module).__name__} lets tokens see those behind them, as encoders do; it cannot generate text"
        )
    if unknown:
        raise ModelError(f"{type(module).__name__} attends with {', '.join(unknown)}, which is not computed here")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise ModelError(f"{type(module).__name__} has keys and values of different shapes; it cannot be served")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ModelError(f"{type(module).__name__} does not say which layer it is; it cannot be served")
    step.calls.append((layer, _Heads(query.shape[1], key.shape[1], key.shape[3])))
    num, cache = step.num_tokens, step.context.kv_cache
    out_TNH = step.context.attention.attend(
        query[0].transpose(0, 1)[:num],
        torch.stack((key[0], value[0])).permute(2, 0, 1, 3)[:num],
        cache[layer] if cache else None,
        step.context.plan,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return F.pad(out_TNH, (0, 0, 0, 0, 0, query.shape[2] - num)).unsqueeze(0), None


def _fix_frequencies(base: nn.Module, num_positions: int | None) -> None:
    """Keep rotary frequencies from following the longest sequence of a batch (see `rope.py` for the reason)."""
    module: Any
    for module in base.modules():
        kind = getattr(module, "rope_type", None)
        if not isinstance(kind, str) or kind not in ("dynamic", "longrope"):
            continue
        if kind == "longrope":
            served = num_positions or module.config.max_position_embeddings
            inverse, _ = ROPE_INIT_FUNCTIONS[kind](module.config, module.inv_freq.device, seq_len=served)
            module.inv_freq.copy_(inverse)
        module.rope_type = "default"
