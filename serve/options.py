"""Every option once: frozen dataclasses, unit and reason beside each field. Flags and config keys are these names.

Standard library only, so that an engine starts where pydantic does not exist; `serve/config.py` validates outside input
into these classes. Names are vLLM's where the meaning is the same. Nothing writes to options after construction; what
is measured at start-up (KV blocks, say) is passed on as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """One model and how its replicas compute it."""

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
    threads: int | None = None
    """Compute threads of one replica. None: its share of the cores (cores / replicas on this machine)."""
    num_replicas: int = 1
    num_cpus: float = 0.25
    """Logical CPUs a replica reserves on Ray. A placement hint, not a limit: text, draft, image and gateway fit two."""

    max_model_len: int | None = None
    """Positions of one sequence. None: what the model was made for, at most what the KV cache holds."""
    max_num_seqs: int = 256
    """Sequences computed in one step."""
    max_num_batched_tokens: int | None = None
    """Token positions computed in one step; bounds a decode's wait behind others' prefill. None: 8192 on CUDA, 1024 on
    CPU (about 0.6 s of a 0.6 B model there)."""
    max_num_waiting: int = 1024
    """Accepted requests that wait for their first step; beyond it requests are refused with a retry time."""
    block_size: int = 16
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory for weights, activations and KV cache together."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache. None: on CUDA what is left of `gpu_memory_utilization`; on CPU enough for
    `max_num_seqs` / 8 full-length sequences, at most a quarter of the free memory."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    step_timeout_s: float = 300.0
    """A step that takes longer makes the engine unhealthy."""
    chat_template: str | None = None
    """File with a Jinja template that replaces the model's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayOptions:
    """The HTTP edge: socket, keys and limits."""

    host: str = "127.0.0.1"
    port: int = 8000
    num_gateways: int = 1
    """Gateway processes; with more than one they share the port (SO_REUSEPORT)."""
    api_key: tuple[str, ...] = ()
    """Keys clients must send as `Authorization: Bearer …`. Also from TANDEM_API_KEY and `api_key_file`."""
    api_key_file: str | None = None
    """One key a line."""
    allow_unauthenticated: bool = False
    """Bind other than loopback without keys."""
    metrics_require_key: bool = False
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 16 << 10
    max_headers: int = 100
    header_timeout_s: float = 10.0
    """To receive a request's head."""
    body_timeout_s: float = 30.0
    """To receive a request's body."""
    keep_alive_s: float = 75.0
    max_connections: int = 4096
    default_timeout_s: float = 600.0
    """Deadline of a request that names none."""
    heartbeat_s: float = 10.0
    """A comment line on a silent stream; bounds how late a vanished client is noticed."""
    drain_timeout_s: float = 30.0
    """How long a shutdown waits for running requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """One application: its models and its gateway. Where it runs (Ray or local processes) is not its business."""

    models: tuple[ModelOptions, ...]
    gateway: GatewayOptions = field(default_factory=GatewayOptions)
