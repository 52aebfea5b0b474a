"""Random numbers without state: the noise of one draw is a function of (seed, position, stream) and the token id.

Adding Gumbel noise to log-probabilities and taking the largest is a draw from the distribution (Gumbel, 1954; Maddison
et al., 2014). With noise from a counter-based generator (Salmon et al., 2011) nothing has to be remembered between
steps: a request draws the same tokens in any batch, after preemption, in another process. The hash is integer
arithmetic modulo 2^32, so its bits are equal on every device; the two logarithms after it are rounded by each device's
own library.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from serve.transfer import to_device

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """Independent sequences of noise under one seed."""

    TARGET = 0
    """The draw of a token from the model's own distribution."""
    DRAFT = 1
    """The draw of a draft token from the draft model's distribution."""
    ACCEPT = 2
    """Whether a draft token is accepted."""
    RECOVER = 3
    """The draw of the token in the place of a rejected one."""


class GumbelNoise:
    """Noise over a vocabulary. Token ids are hashed once; a draw mixes them with the two 32-bit keys of its row."""

    def __init__(self, vocab_size: int, device: torch.device):
        ids = torch.arange(vocab_size, dtype=torch.int32)
        self.hashed_V = _mix_(_mix_(ids.add_(0x3C6EF372))).to(device)

    def perturb_(self, scores_RV: torch.Tensor, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Add to each row of log-probabilities (unnormalised, float32) the noise of its key, in place."""
        return scores_RV.sub_(self.log_exponential(keys))

    def log_exponential(self, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
        """log E_RV with E standard exponential: minus this is Gumbel noise."""
        # |signed| keeps full relative precision towards 0, where the winners are: u in [2^-32, 1 - 2^-24].
        u_RV = self.bits(keys).float().abs_().add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
        return u_RV.neg_().log1p_().neg_().log_()

    def bits(self, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
        """32 random bits per row and token, as int32."""
        keys_R2 = to_device(keys, self.hashed_V.device, torch.int32)
        x_RV = self.hashed_V.bitwise_xor(keys_R2[:, :1])
        spare_RV = torch.empty_like(x_RV)
        x_RV.mul_(0x7FEB352D)
        _xor_shift_(x_RV, 15, spare_RV).bitwise_xor_(keys_R2[:, 1:])
        x_RV.mul_(_signed(0x846CA68B))
        return _xor_shift_(x_RV, 16, spare_RV)


def row_key(seed: int, position: int, stream: Stream = Stream.TARGET) -> tuple[int, int]:
    """The two keys of one draw: splitmix64 (Steele et al., 2014) over the seed, then over position and stream."""
    state = _state(seed, position, stream)
    return _signed(state & 0xFFFFFFFF), _signed(state >> 32)


def seed_state(seed: int) -> tuple[int, int]:
    """What of a draw's keys follows from the seed alone: two 32-bit halves."""
    state = _splitmix64(seed & _MASK64)
    return _signed(state & 0xFFFFFFFF), _signed(state >> 32)


def uniform(seed: int, position: int, stream: Stream) -> float:
    """One number in (0, 1), of 52 bits."""
    return ((_state(seed, position, stream) >> 12) + 0.5) * 2.0**-52


def _state(seed: int, position: int, stream: Stream) -> int:
    return _splitmix64(_splitmix64(seed & _MASK64) ^ (position << 8 | stream))


def _splitmix64(x: int) -> int:
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The 32 bits of `x` as the int32 that torch multiplies with."""
    return x - (1 << 32) if x >= 1 << 31 else x


def _xor_shift_(x: torch.Tensor, bits: int, spare: torch.Tensor) -> torch.Tensor:
    """x ^= x >>> bits (logical shift: torch's on int32 copies the sign, hence the mask)."""
    torch.bitwise_right_shift(x, bits, out=spare)
    return x.bitwise_xor_(spare.bitwise_and_((1 << (32 - bits)) - 1))


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 (Wellons, 2018), in place: a bijection of 32 bits with low avalanche bias."""
    spare = torch.empty_like(x)
    _xor_shift_(x, 16, spare).mul_(0x7FEB352D)
    _xor_shift_(x, 15, spare).mul_(_signed(0x846CA68B))
    return _xor_shift_(x, 16, spare)
