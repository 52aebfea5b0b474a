"""Replicas whose devices are only as fast as a stated model says: everything is real but the computation.

Scheduler, KV cache, engine thread, backend and channel are those of a replica. The runner sleeps for the time that the
device model gives a step, and answers with token 1 or a black image. So the capacity of several replicas adds up, as
on devices of their own, however few cores this machine has; what the engine itself costs comes on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from serve.engine.engine import Engine
from serve.image.backend import ImageBackend
from serve.image.limits import Limits
from serve.image.pace import ImagePace
from serve.image.scheduler import ImageScheduler
from serve.image.trajectory import ImageBatch, ImageOutput, Stage
from serve.request import ImageLimits, ModelCard
from serve.text.backend import TextBackend
from serve.text.kv_cache import KVCache
from serve.text.pace import TextPace
from serve.text.prefix_digest import PrefixDigest
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import TokenBatch, TokenOutput

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDevice:
    """Seconds of a step: `base_s`, `row_s` a row, `unit_s` a further prompt position, `context_s` a position that the
    step's rows attend to."""

    base_s: float
    row_s: float
    unit_s: float
    kv_cache_tokens: int
    context_s: float = 0.0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048

    def step_s(self, num_rows: int, num_further: int, num_context: int = 0) -> float:
        return self.base_s + self.row_s * num_rows + self.unit_s * num_further + self.context_s * num_context

    def batch_s(self, batch: TokenBatch) -> float:
        num_rows = len(batch.rows)
        num_context = sum([row.start + len(row.token_ids) for row in batch.rows]) if self.context_s else 0
        return self.step_s(num_rows, batch.num_tokens - num_rows, num_context)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageDevice:
    """Seconds of a denoise step: `base_s` and `token_s` a latent token; encoding and decoding take `base_s`."""

    base_s: float
    token_s: float


class _PacedRunner:
    """Sleeps in `submit`, as a CPU computes there."""

    def collect(self, handle: TokenOutput | ImageOutput) -> TokenOutput | ImageOutput:
        return handle

    def release(self, job_id: str) -> None: ...

    def check(self) -> None: ...


class PacedTextRunner(_PacedRunner):
    def __init__(self, device: TextDevice, token_id: int = 1):
        self._device = device
        self._token_id = token_id

    def submit(self, batch: TokenBatch) -> TokenOutput:
        time.sleep(self._device.batch_s(batch))
        return answer(batch, self._token_id)


class PacedImageRunner(_PacedRunner):
    def __init__(self, device: ImageDevice):
        self._device = device

    def submit(self, batch: ImageBatch) -> ImageOutput:
        is_denoising = batch.kind is Stage.DENOISE
        time.sleep(self._device.base_s + self._device.token_s * batch.num_tokens * is_denoising)
        if batch.kind is Stage.DECODE:
            return ImageOutput(pixels=[bytes(row.job.width * row.job.height * 3) for row in batch.rows])
        return ImageOutput(num_prompt_tokens=[1] * len(batch.rows))


def answer(batch: TokenBatch, token_id: int = 1) -> TokenOutput:
    """What a device says to a batch: always the same token."""
    nothing = [None] * len(batch.rows)
    return TokenOutput([(token_id,) if row.samples else () for row in batch.rows], list(nothing), list(nothing))


def text_scheduler(device: TextDevice, vocab_size: int = 32_000) -> TokenScheduler:
    """As such a device has it, with a digest of its prefixes."""
    return TokenScheduler(
        KVCache(device.kv_cache_tokens // BLOCK_SIZE, BLOCK_SIZE, digest=PrefixDigest(BLOCK_SIZE)),
        max_num_seqs=device.max_num_seqs,
        max_num_batched_tokens=device.max_num_batched_tokens,
        max_model_len=device.kv_cache_tokens // 4,
        eos_token_ids=[],
        vocab_size=vocab_size,
    )


def text_replica(device: TextDevice) -> tuple[TextBackend, PrefixDigest]:
    """A started replica of the model "paced"."""
    scheduler = text_scheduler(device)
    engine: Engine = Engine(scheduler, PacedTextRunner(device), pace=TextPace(scheduler))
    engine.start()
    digest = scheduler.kv_cache.digest
    assert digest is not None
    return TextBackend(engine, _card("text", None)), digest


def image_replica(device: ImageDevice) -> ImageBackend:
    """A started replica of the model "paced"."""
    limits = ImageLimits(
        width=1024, height=1024, num_inference_steps=20, guidance_scale=1.0, size_multiple=16, max_pixels=1 << 22,
        max_steps=100, solvers=("euler",),
    )  # fmt: skip
    scheduler = ImageScheduler(
        Limits(limits, lambda prompt: None, lambda solver, num_steps: None),
        lambda width, height: width * height // 256,
        max_num_images=8,
        max_num_batched_tokens=8192,
    )
    engine: Engine = Engine(scheduler, PacedImageRunner(device), pace=ImagePace(scheduler.num_tokens))
    engine.start()
    return ImageBackend(engine, _card("image", limits))


def _card(kind: str, image: ImageLimits | None) -> ModelCard:
    return ModelCard(
        name="paced", kind=kind, source="", device="paced", dtype="", num_parameters=0, threads=1, load_s=0.0,
        vocab_size=32_000, image=image,
    )  # fmt: skip
