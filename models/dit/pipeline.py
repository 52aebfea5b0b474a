"""Any other text-to-image pipeline of diffusers, one denoise step at a time, without batching.

A pipeline owns its loop, so it runs in a thread of its own that is held in the pipeline's step callback: whoever drives
it lets it go on until the next callback and waits meanwhile. So the two never compute at the same time, any number of
runs can be advanced in turn, and what must not wait for a whole image (other requests, deadlines, a cancel) waits for a
step. There are no previews: the callback shows noisy latents, not an estimate of the finished image.
"""

from __future__ import annotations

import copy
import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.dit.base import count_parameters


class NotSteppable(ValueError):
    """The pipeline cannot be run step by step from a prompt; the message names what it lacks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSpec:
    """Names as in `DiTSpec`, where the meaning is the same."""

    dtype: torch.dtype
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    size_multiple: int
    max_pixels: int
    solvers: tuple[str, ...]
    """The one scheduler that the checkpoint comes with, by the name of its class."""
    sizes: tuple[tuple[int, int], ...] = ()
    has_guidance: bool = True
    has_negative_prompt: bool = True


@dataclass(frozen=True, slots=True)
class PipelineStep:
    """What one `advance` did."""

    step: int
    """Denoise steps done."""
    num_steps: int
    """In total; not the number asked for where a scheduler visits some times twice (Heun)."""
    pixels: Tensor | None
    """The finished image (3, P, Q), 0..1, float32 on the CPU; None while there is more to do."""


class StockPipeline:
    """A loaded pipeline that images can be started on. Its components are shared by all runs and hold no state."""

    def __init__(self, pipeline: Any, spec: PipelineSpec) -> None:
        self.spec = spec
        self._pipeline = pipeline
        self._parameters = step_parameters(type(pipeline))
        self.num_parameters: int = count_parameters(pipeline.components.values())

    def start(
        self,
        prompt: str,
        *,
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        negative_prompt: str = "",
    ) -> PipelineRun:
        """An image to be advanced. Raises ValueError for a setting that the pipeline does not know."""
        spec = self.spec
        arguments: dict[str, Any] = {"prompt": prompt, "num_inference_steps": num_inference_steps}
        if spec.has_guidance:
            arguments["guidance_scale"] = guidance_scale
        if negative_prompt:
            if not spec.has_negative_prompt:
                raise ValueError(f"{type(self._pipeline).__name__} computes no negative_prompt; leave it out")
            arguments["negative_prompt"] = negative_prompt
        if not spec.sizes:
            arguments |= {"width": width, "height": height}
        elif (width, height) not in spec.sizes:
            raise ValueError(f"width x height is {width}x{height}; this model makes {spec.width}x{spec.height} only")
        arguments["generator"] = torch.Generator().manual_seed(seed)
        pipeline = copy.copy(self._pipeline)
        # Schedulers count steps and pipelines note guidance on themselves: each run has its own of both.
        pipeline.scheduler = copy.deepcopy(self._pipeline.scheduler)
        return PipelineRun(pipeline, arguments)


class PipelineRun:
    """One image on its way. Driven by one thread; computes in its own, which is held between calls."""

    def __init__(self, pipeline: Any, arguments: dict[str, Any]) -> None:
        self._pipeline = pipeline
        self._arguments = arguments
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
        self._may_go = threading.Semaphore(0)
        self._is_held = threading.Semaphore(0)
        self._is_closed = False
        self._step = 0
        self._num_steps: int = arguments["num_inference_steps"]
        self._pixels: Tensor | None = None
        self._error: BaseException | None = None

    def advance(self) -> PipelineStep:
        """Compute to the end of the next denoise step, and wait for it. The first also encodes, the last also decodes.

        Raises what the pipeline raised; the run has ended then.
        """
        if self._is_closed or self._pixels is not None or self._error is not None:
            raise RuntimeError("the run has ended; start another")
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._may_go.release()
        self._is_held.acquire()
        if isinstance(self._error, _Closed):
            raise RuntimeError("the run was closed in this step; start another")
        if self._error is not None:
            raise self._error
        return PipelineStep(self._step, self._num_steps, self._pixels)

    def close(self, timeout_s: float = 60.0) -> None:
        """End the run where it is held and wait for its thread. Any number of times, at any point.

        Raises TimeoutError when the thread does not end; it can only be in a step that another thread advances.
        """
        self._is_closed = True
        if self._thread.ident is None:
            return
        self._may_go.release()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"a pipeline is still in its step after {timeout_s:g} s")

    def _run(self) -> None:
        try:
            images = self._pipeline(**self._arguments, output_type="pt", callback_on_step_end=self._on_step_end).images
            self._pixels = images[0].detach().to("cpu", torch.float32).clamp(0, 1)
        except BaseException as error:
            self._error = error
        finally:
            self._is_held.release()

    def _on_step_end(self, pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._step = step + 1
        self._num_steps = getattr(pipeline, "num_timesteps", None) or len(pipeline.scheduler.timesteps)
        if not self._is_closed and self._step < self._num_steps:
            self._is_held.release()
            self._may_go.acquire()
        if self._is_closed:
            raise _Closed
        return tensors


class _Closed(BaseException):
    """Unwinds a pipeline from its callback. Not an Exception, so that no pipeline takes it for a failure of a step."""


def step_parameters(pipeline_class: type[Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a call. Raises NotSteppable: no step callback, or more is wanted than a text."""
    parameters = dict(inspect.signature(pipeline_class.__call__).parameters)
    name = pipeline_class.__name__
    needed = ("prompt", "callback_on_step_end", "generator", "output_type", "num_inference_steps")
    lacking = [argument for argument in needed if argument not in parameters]
    if lacking:
        raise NotSteppable(
            f"{name} takes no {' and no '.join(lacking)}, so it cannot be run from a prompt step by step"
        )
    if "num_frames" in parameters:
        raise NotSteppable(f"{name} makes videos, which are not served")
    required = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.name not in ("self", "prompt", "height", "width", "num_inference_steps", "guidance_scale")
        and parameter.kind is not parameter.VAR_KEYWORD
    ]
    if required:
        raise NotSteppable(f"{name} needs {', '.join(required)} beside a prompt, which is not served")
    return parameters
