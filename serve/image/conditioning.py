"""Prompts as the transformer takes them, encoded once: a small cache by text, as `n` images, the empty negative prompt
and a playground's next seed all repeat what was encoded before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from models.dit.base import Conditioning, DiT

CACHED_PROMPTS = 64
"""Least recently used leave. With the largest of the common encoders (T5-XXL, 256 tokens × 4096 × 2 bytes, beside two
CLIPs) that is 150 MB on the device."""


class Prompts:
    """Encodes through the model, or remembers. A failure leaves the cache as it was."""

    def __init__(self, model: DiT, capacity: int = CACHED_PROMPTS):
        self._model = model
        self._capacity = capacity
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> dict[str, Conditioning]:
        """All of them by text; those that are new in one pass."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        if new:
            found.update(zip(new, self._model.encode(new), strict=True))
        for prompt, conditioning in found.items():
            self._cache[prompt] = conditioning
            self._cache.move_to_end(prompt)
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return found
