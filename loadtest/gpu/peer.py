"""The mixed trace of `trace.py` through transformers' own continuous batching: same shape, same card, same requests.

It gets what its documentation advises: hints about the workload, its own choice of cache, attention, graphs and
asynchronous batching, and a warm-up. Times of tokens are those that it records itself.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loadtest.gpu.bench import Bench
from loadtest.gpu.shapes import TextShape
from loadtest.gpu.trace import LOADS, TINY_LOADS, Answer, Ask, mixed_trace, summary


def run(bench: Bench) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before it is imported: it would look for kernels on the hub
    import transformers

    shape = TextShape.of(is_rehearsal=bench.is_rehearsal)
    loads = TINY_LOADS if bench.is_rehearsal else LOADS
    traces = {
        name: mixed_trace(shape.vocab_size, num_requests=number, rate=rate, is_tiny=bench.is_rehearsal)
        for name, number, rate in loads
    }
    with tempfile.TemporaryDirectory() as scratch:
        model = _model(shape.write(Path(scratch) / "model"), bench.device)
    peer = Peer(model, [ask for asks in traces.values() for ask in asks], is_tiny=bench.is_rehearsal)
    try:
        peer.play([Ask(0.0, asks[0].token_ids, asks[0].num_output) for asks in traces.values()], 120.0)  # warm
        for name, asks in traces.items():
            if not bench.has_time(f"mixed trace, {name}", 0 if bench.is_rehearsal else 15):
                continue
            answers = peer.play(asks, max(1.0, bench.left_s))
            if answers is None:
                bench.note(f"mixed trace, {name}: transformers was not done with it when its seconds were over")
                continue
            engine = f"transformers {transformers.__version__}"
            bench.row("mixed", engine=engine, load=name, **summary(asks, answers), config=peer.config)
    finally:
        peer.close()


class Peer:
    """A model with random weights behind transformers' manager, which generates in a thread of its own."""

    def __init__(self, model: Any, asks: list[Ask], *, is_tiny: bool):
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        small: dict[str, Any] = {"num_blocks": 64, "max_batch_tokens": 256} if is_tiny else {}
        hints = WorkloadHints(
            max_prompt_length=max(len(ask.token_ids) for ask in asks),
            max_generated_length=max(ask.num_output for ask in asks),
            num_requests=len(asks),
        )
        self._manager = model.init_continuous_batching(
            generation_config=greedy,
            continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **small),
            workload_hints=hints,
        )
        if not is_tiny:
            self._manager.warmup()
        self._manager.start()
        settings = self._manager.continuous_batching_config
        self.config = (
            f"{model.config._attn_implementation}, graphs {settings.use_cuda_graph}, "
            f"asynchronous {settings.use_async_batching}"
        )

    def play(self, asks: list[Ask], within_s: float) -> list[Answer] | None:
        """Each is added when it is due. None when they are not all done in time; RuntimeError when it gives up."""
        answers = [Answer(ask.num_output) for ask in asks]
        index_of: dict[str, int] = {}
        began = time.perf_counter()
        num_added = num_done = 0
        while num_done < len(asks):
            now = time.perf_counter() - began
            if now > within_s:
                return None
            while num_added < len(asks) and asks[num_added].due_s <= now:
                ask = asks[num_added]
                name = self._manager.add_request(
                    ask.token_ids, max_new_tokens=ask.num_output, eos_token_id=-1, record_timestamps=True
                )
                index_of[name] = num_added
                num_added += 1
            wait_s = 0.5 if num_added == len(asks) else max(0.001, asks[num_added].due_s - now)
            result = self._manager.get_result(timeout=min(0.5, wait_s))
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("transformers' generation thread has stopped")
                continue
            if result.error:
                raise RuntimeError(f"transformers failed a request: {result.error}")
            if result.is_finished():
                index = index_of[result.request_id]
                due = began + asks[index].due_s
                answers[index].at_s = [at - due for at in result.timestamps]
                num_done += 1
        return answers

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10, hard_stop=True)


def _model(folder: Path, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(dtype).eval()
