"""Every option once: frozen dataclasses, unit and reason beside each field. Flags and config keys are these names.

Standard library only, so that an engine starts where pydantic does not exist; `serve/config.py` validates outside input
into these classes. Names are vLLM's where the meaning is the same. Nothing writes to options after construction; what
is measured at start-up (KV blocks, say) is passed on as an argument.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


def bounded(default: Any, *, least: float, most: float, only: str | None = None) -> Any:
    """A field whose value, when it is not None, must lie in [least, most]. `only`: the kind of model it is for."""
    return field(default=default, metadata={"least": least, "most": most, "only": only})


def only_for(kind: str, default: Any) -> Any:
    """A field for one kind of model."""
    return field(default=default, metadata={"only": kind})


def check_bounds(options: Any) -> None:
    """Raise ValueError naming the first field of `options` that lies outside its bounds."""
    for spec in dataclasses.fields(options):
        value = getattr(options, spec.name)
        if "least" in spec.metadata and value is not None:
            least, most = spec.metadata["least"], spec.metadata["most"]
            if not least <= value <= most:
                raise ValueError(f"{spec.name} is {value!r}; give a value from {least} to {most}")


def check_kind(options: Any, kind: str) -> None:
    """Raise ValueError naming the first field of `options` that was set and does nothing for this kind of model."""
    for spec in dataclasses.fields(options):
        only = spec.metadata.get("only")
        if only not in (None, kind) and getattr(options, spec.name) != spec.default:
            raise ValueError(
                f"{spec.name} is an option of {only} models and means nothing for {options.model!r}; leave it out, "
                f"where several models are served by giving each its own options in a config file"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeOptions:
    """Drafts that the model verifies: several tokens a step where they hold. Changes no output, only the speed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    method: Literal["draft_model", "ngram"] = "draft_model"
    """ngram: what followed the newest tokens where they stood before in the same sequence; needs no model."""
    model: str | None = None
    """The draft model, of the same vocabulary: folder, hub id or embedded name."""
    num_speculative_tokens: int = bounded(5, least=0, most=16)
    """Drafts a step at most; how many it takes, down to none, follows what was measured. 0: no speculation."""
    prompt_lookup_max: int = bounded(4, least=1, most=32)
    """Longest n-gram looked up, tried first."""
    prompt_lookup_min: int = bounded(2, least=1, most=32)
    rejection_sample_method: Literal["coupled", "standard"] = "coupled"
    """coupled: the same tokens as without speculation. standard: rejection sampling (Leviathan et al.), the same
    distribution only, but a draft model's drafts hold more often when sampling."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.method == "draft_model" and self.model is None and self.num_speculative_tokens:
            raise ValueError("model is missing; name the draft model, or say method ngram, which needs none")
        if self.method == "ngram" and self.model is not None:
            raise ValueError(f"model is {self.model!r}, but method ngram needs none; leave one of them out")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, above prompt_lookup_max ({self.prompt_lookup_max}); "
                f"lower it"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscalingOptions:
    """Bounds and targets of a model's number of replicas. The rule is told in `serve/autoscaling.py`. Names are Ray
    Serve's where the meaning is the same; what is not set here differs from its defaults."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    min_replicas: int = bounded(1, least=0, most=1024)
    """0: none while nobody asks; the next request then waits for one to load."""
    max_replicas: int = bounded(1, least=1, most=1024)
    initial_replicas: int | None = bounded(None, least=1, most=1024)
    """At the start. None: `min_replicas`, but one where that is 0, so that what cannot be loaded shows at once."""
    target_wait_s: float = bounded(1.0, least=0.01, most=3600)
    """How much longer than alone a newcomer may be predicted to take."""
    target_attainment: float = bounded(0.95, least=0.5, most=1.0)
    """Share of the time in which newcomers are to find that wait or less."""
    target_utilization: float = bounded(0.7, least=0.1, most=1.0)
    """Share of a replica's time that what is asked of it may take. At 0.7 a decode step takes 3.3 times what it takes
    alone, and images wait 2.3 images."""
    target_kv_cache_usage: float = bounded(0.8, least=0.1, most=1.0)
    """Share of a replica's KV cache that unfinished work may hold."""
    upscale_delay_s: float = bounded(2.0, least=0, most=3600)
    """How long more replicas must be needed before they are started. From zero the first one starts at once."""
    downscale_delay_s: float | None = bounded(None, least=0, most=86400)
    """How long fewer must be enough before some are stopped. None: 60 s, or twice what a replica takes to load if that
    is more. Never less than what it takes to load."""
    downscale_to_zero_delay_s: float | None = bounded(None, least=0, most=86400)
    """How long nothing must have been asked before the last one is stopped. None: `downscale_delay_s`."""
    look_back_period_s: float = bounded(10.0, least=1, most=600)
    """That load is averaged over."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, above max_replicas ({self.max_replicas}); raise max_replicas"
            )
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"initial_replicas is {self.initial_replicas}, not from min_replicas ({self.min_replicas}) to "
                f"max_replicas ({self.max_replicas}); leave it out or change it"
            )

    @property
    def num_initial(self) -> int:
        """Replicas at the start."""
        return max(1, self.min_replicas) if self.initial_replicas is None else self.initial_replicas


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """One model and how its replicas compute it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    """How `serve/config.py` reads these classes; pydantic's own name for it, without importing pydantic."""

    model: str
    """Folder, hub id, or the name of an embedded model (`tandem-text`)."""
    kind: Literal["text", "image"] | None = None
    """None: `config.json` makes it text, `model_index.json` makes it image."""
    served_model_name: tuple[str, ...] = ()
    """Names clients may use; the first is reported. Empty: the hub id or the folder's name."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's own on CPU; on CUDA bfloat16 for what is stored in 16 or 32 bits."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the right shapes, nothing read but the config."""
    quantization: Literal["fp8", "int8", "int4"] | None = only_for("text", None)
    """What the layers' matrices are quantised to as they are loaded; embeddings, norms and head are not. fp8: e4m3, a
    scale a row of weights and of activations, where CUDA multiplies them (Ada, Hopper). int8, int4: weights only, a
    scale a row, or a scale and a zero point every 128 numbers. None: as stored; quantised checkpoints say it of
    themselves (fp8, compressed-tensors)."""
    threads: int | None = bounded(None, least=1, most=1024)
    """Compute threads of each rank of a replica. None: its share of the cores (cores / ranks of all replicas on this
    machine), but one for a model of less than 30 M parameters."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    num_replicas: int = bounded(1, least=1, most=1024)
    autoscaling_config: AutoscalingOptions | None = None
    """As many replicas as the load asks for, instead of `num_replicas`: {"min_replicas": 0, "max_replicas": 4, ...}."""
    max_surge_percent: int = bounded(25, least=0, most=100)
    """Of `num_replicas`, rounded up: how many more may run while an update of an application on Ray replaces them, so
    that none is missing. They need devices that are spare; 0 stops old ones first instead."""
    num_cpus: float = bounded(0.25, least=0, most=1024)
    """Logical CPUs a replica reserves on Ray. A placement hint, not a limit: text, draft, image and gateway fit two."""
    num_gpus: float | None = bounded(None, least=0, most=1)
    """GPUs that each rank of a replica reserves on Ray. None: 1 where `device` is cuda, else 0. Replicas with fractions
    share one, each with its part of the memory (`gpu_memory_utilization`)."""
    accelerator_type: str | None = None
    """On Ray, only nodes with this GPU, by Ray's name for it (H100, L40S, ...). None: any."""

    tensor_parallel_size: int = bounded(1, least=1, most=1024)
    """Devices that share every layer: heads, feed-forward widths and the vocabulary are split over them. A replica has
    one process (rank) a device; `tandem plan` says which sizes a model can be split into and what each costs."""
    pipeline_parallel_size: int = bounded(1, least=1, most=1024, only="text")
    """Stages of consecutive layers, each on `tensor_parallel_size` devices of its own."""
    cfg_parallel_size: int = bounded(1, least=1, most=1024, only="image")
    """Devices that share the rows of a step: guidance's two halves and the images of a batch."""
    ulysses_degree: int = bounded(1, least=1, most=1024, only="image")
    """Devices that share the tokens of an image, which exchange heads for tokens in attention (DeepSpeed-Ulysses)."""

    max_num_batched_tokens: int | None = bounded(None, least=1, most=1 << 20)
    """Token positions computed in one step; bounds a decode's wait behind others' prefill. None: 8192 on CUDA, 1024 on
    CPU (about 0.6 s of a 0.6 B model there). For images: latent tokens times rows; None: 16384 on CUDA, 4096 on CPU."""
    max_num_waiting: int = bounded(1024, least=1, most=1 << 20)
    """Accepted requests that wait for their first step; beyond it requests are refused with a retry time."""
    step_timeout_s: float = bounded(300.0, least=1, most=86400)
    """A step that takes longer makes the engine unhealthy, as does work of which no step is completed for so long."""
    canary_period_s: float = bounded(30.0, least=0.1, most=86400)
    """An engine with nothing to do computes a canary so often, to find a lost device before a request does. It costs
    about one step, which a newcomer may have to wait for."""

    max_model_len: int | None = bounded(None, least=1, most=1 << 24, only="text")
    """Positions of one sequence. None: what the model was made for, at most what the KV cache holds."""
    max_num_seqs: int = bounded(256, least=1, most=4096, only="text")
    """Sequences computed in one step."""
    block_size: int = bounded(16, least=1, most=1024, only="text")
    """Positions in a block of the KV cache."""
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "int8"] = only_for("text", "auto")
    """What keys and values are kept in. auto: as the model computes. fp8 (e4m3), int8: one byte a number, with a scale
    for every position and head; about twice as many fit as in bfloat16, and outputs differ a little. A draft model's
    are kept as it computes."""
    attention_backend: Literal["auto", "cpu", "flashinfer", "sdpa", "triton", "varlen"] = only_for("text", "auto")
    """What computes attention. auto: the fastest as measured for this device and shape, where it was
    (`models/attention/measured.json`), else triton on CUDA and cpu on CPU (sdpa with a quantised cache)."""
    enable_prefix_caching: bool = only_for("text", True)
    gpu_memory_utilization: float = bounded(0.9, least=0.01, most=1.0, only="text")
    """Share of the device's memory for weights, activations and KV cache together."""
    kv_cache_memory_bytes: int | None = bounded(None, least=1, most=1 << 50, only="text")
    """Size of the KV cache, of each rank where there are several. None: on CUDA what is left of
    `gpu_memory_utilization`; on CPU enough for `max_num_seqs` / 8 full-length sequences, at most a quarter of the free
    memory; decodes there keep copies of what they have cached, up to half as much again."""
    speculative_config: SpeculativeOptions | None = field(default=None, metadata={"only": "text"})
    """Speculative decoding, as {"model": ..., "num_speculative_tokens": ...} or {"method": "ngram", ...}. None: only
    `tandem-text` speculates, with `tandem-text-draft`; {"num_speculative_tokens": 0} turns that off."""
    chat_template: str | None = only_for("text", None)
    """File with a Jinja template that replaces the model's own."""
    tool_call_parser: Literal[
        "auto", "none", "hermes", "llama3_json", "llama4_json", "pythonic", "llama4_pythonic", "mistral"
    ] = only_for("text", "auto")
    """How the model writes tool calls. auto: as its chat template asks it to. none: tools are refused."""
    reasoning_parser: Literal["auto", "none", "deepseek_r1", "qwen3"] = only_for("text", "auto")
    """How reasoning is told from the answer: `<think>…</think>` that the template or the model opens (qwen3), or that
    every answer begins inside (deepseek_r1). auto: qwen3 if the chat template knows the tags. none: it stays text."""

    max_num_images: int = bounded(32, least=1, most=4096, only="image")
    """Images in progress at a time; the rest waits. More than fill a step only take turns, and each holds its latents
    and prompts in memory."""
    max_pixels: int | None = bounded(None, least=1, most=1 << 30, only="image")
    """Width times height of one image. None: what the model was made for."""
    max_inference_steps: int = bounded(250, least=1, most=10000, only="image")
    """Denoise steps of one image, `num_inference_steps`, at most."""

    slo_ttft_s: float = bounded(2.0, least=0.001, most=86400, only="text")
    """Time to the first token that this model promises. Promises are counted (`tandem_slo_requests_total`), for boards
    and alerts; they change nothing else."""
    slo_tpot_s: float = bounded(0.1, least=0.0001, most=86400, only="text")
    """Promised time per output token after the first, as a request's mean."""
    slo_image_s: float = bounded(60.0, least=0.01, most=86400, only="image")
    """Promised time from an image request's head to its last image; a request's own shorter deadline comes first."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.model:
            raise ValueError("model is empty; give a folder, a hub id or the name of an embedded model")
        if self.autoscaling_config is not None and self.num_replicas != 1:
            raise ValueError(
                f"num_replicas is {self.num_replicas}, but autoscaling_config sets how many there are; leave one of "
                f"them out (initial_replicas is the number at the start)"
            )
        if self.quantization == "fp8" and self.device == "cpu":
            raise ValueError("quantization is 'fp8', but device is 'cpu', which has no kernel for it; use 'int8'")
        if self.num_gpus and self.device == "cpu":
            raise ValueError(f"num_gpus is {self.num_gpus:g}, but device is 'cpu'; leave one of them out")
        if self.num_gpus is not None and self.num_ranks > 1 and 0 < self.num_gpus < 1:
            raise ValueError(
                f"num_gpus is {self.num_gpus:g} and {self.name!r} has {self.num_ranks} ranks, each with its own "
                f"device; leave num_gpus out"
            )
        budget = self.max_num_batched_tokens
        if self.kind != "image" and budget is not None and budget < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {budget}, below max_num_seqs ({self.max_num_seqs}); every running sequence "
                f"needs one token a step: raise the first or lower the second (an image model: say kind image)"
            )

    @property
    def num_ranks(self) -> int:
        """Processes, each with a device of its own, that compute one replica together."""
        image = self.cfg_parallel_size * self.ulysses_degree
        return self.tensor_parallel_size * self.pipeline_parallel_size * image

    @property
    def max_num_replicas(self) -> int:
        """Replicas there may be at a time."""
        return self.num_replicas if self.autoscaling_config is None else self.autoscaling_config.max_replicas

    @property
    def gpus_per_rank(self) -> float:
        """That a rank reserves on Ray."""
        return self.num_gpus if self.num_gpus is not None else float(self.device == "cuda")

    @property
    def name(self) -> str:
        """The name reported to clients: the first served name, else a folder's last part or the hub id as it is."""
        if self.served_model_name:
            return self.served_model_name[0]
        return os.path.basename(os.path.abspath(self.model)) if os.path.isdir(self.model) else self.model


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayOptions:
    """The HTTP edge: socket, keys and limits."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    host: str = "127.0.0.1"
    port: int = bounded(8000, least=0, most=65535)
    num_gateways: int = bounded(1, least=1, most=64)
    """Gateway processes. Those of one machine share the port (SO_REUSEPORT). Over a Ray cluster they are spread evenly,
    one a node where there are as many nodes, each at that port of its node: `host` must be one that clients reach."""
    api_key: tuple[str, ...] = ()
    """Keys clients must send as `Authorization: Bearer …`. Also from TANDEM_API_KEY and `api_key_file`. "KEY NAME"
    gives a key a name, under which metrics count its caller."""
    api_key_file: str | None = None
    """One key a line, with a name behind it or not; a line that begins with # is a comment."""
    allow_unauthenticated: bool = False
    """Bind other than loopback without keys."""
    metrics_require_key: bool = False
    max_body_bytes: int = bounded(4 << 20, least=1024, most=1 << 30)
    max_header_bytes: int = bounded(16 << 10, least=1024, most=1 << 20)
    max_headers: int = bounded(100, least=8, most=10000)
    header_timeout_s: float = bounded(10.0, least=0.1, most=3600)
    """To receive a request's head."""
    body_timeout_s: float = bounded(30.0, least=0.1, most=3600)
    """To receive a request's body."""
    write_timeout_s: float = bounded(60.0, least=0.1, most=3600)
    """For a client to read what it was sent once its buffer (64 KiB here) is full; then the connection is cut."""
    keep_alive_s: float = bounded(75.0, least=0.1, most=3600)
    max_connections: int = bounded(4096, least=1, most=1 << 20)
    default_timeout_s: float = bounded(600.0, least=0.1, most=86400)
    """Deadline of a request that names none."""
    max_wait_s: float | None = bounded(None, least=0, most=86400)
    """How much longer than alone a request may be predicted to take, at the replica where that is least, before it is
    refused with the time after which to come again. None: as long as its deadline is."""
    wake_timeout_s: float = bounded(300.0, least=1, most=86400)
    """How long a request for a model that has scaled to zero waits for a replica to load."""
    heartbeat_s: float = bounded(10.0, least=0.1, most=3600)
    """A comment line on a silent stream; bounds how late a vanished client is noticed."""
    drain_timeout_s: float = bounded(30.0, least=0, most=86400)
    """How long a shutdown waits for running requests."""
    channel_ports: str | None = None
    """On Ray: FIRST-LAST, the TCP ports at which hub and replicas listen for gateways, for firewalls between nodes. A
    node needs one for each of them that it may hold. None: any free ones."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.channel_ports is not None:
            first, _, last = self.channel_ports.partition("-")
            if not (first.isdecimal() and last.isdecimal() and 1024 <= int(first) <= int(last) <= 65535):
                raise ValueError(
                    f"channel_ports is {self.channel_ports!r}; give two ports from 1024 to 65535, as in 7000-7099"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """One application: its models and its gateway. Where it runs (Ray or local processes) is not its business."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    models: tuple[ModelOptions, ...]
    gateway: GatewayOptions = field(default_factory=GatewayOptions)

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models is empty; name at least one model")
        names = [name for model in self.models for name in (model.served_model_name or (model.name,))]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models answer to {name!r}; give one of them another served_model_name")
