"""How the host tells the sampler's kernels what rows ask: 32-bit words at fixed places."""

from __future__ import annotations

import triton.language as tl

NUM_WORDS = tl.constexpr(16)
"""Of a row of parameters."""
SEED = tl.constexpr(0)
"""Two words: splitmix64 of it."""
TEMPERATURE = tl.constexpr(2)
MARGIN = tl.constexpr(3)
"""log of min-p"""
TOP_K = tl.constexpr(4)
"""0 keeps all."""
TOP_P = tl.constexpr(5)
REPETITION = tl.constexpr(6)
PRESENCE = tl.constexpr(7)
FREQUENCY = tl.constexpr(8)
NUM_PROMPT = tl.constexpr(9)
END_FROM = tl.constexpr(10)
"""The first position that may hold an end token."""
NUM_BIASES = tl.constexpr(11)
NUM_ENDS = tl.constexpr(12)
ENTRIES = tl.constexpr(13)
"""Row of biases, then end tokens, each sorted by token: pairs of token and value."""
HISTORY = tl.constexpr(14)
"""Row of tokens by position."""

# Words of a draw; these lie [words, draws].
SLOT = tl.constexpr(0)
"""Row of parameters, or -1: the largest logit is the token."""
POSITION = tl.constexpr(1)
COUNTS = tl.constexpr(2)
"""Row of the step's counts of tokens, or -1."""
SCORES = tl.constexpr(3)
"""Row of the step's changed scores, or -1: they are the logits."""
