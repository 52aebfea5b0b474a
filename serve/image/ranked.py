"""A diffusion transformer on several ranks, as the driver's runner sees it: a model like any other.

Text encoders and VAE are the driver's own. A forward of the transformer is told to all ranks (`Forward`), its tensors
are broadcast, every rank computes its part, and the driver has the prediction. From the telling on the ranks are out of
step with each other if anything fails: that is a `DeviceFault`, with the words of the peer that failed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from models.dit.base import Conditioning, DiT, DiTSpec
from models.dit.part import Part
from serve.engine.interface import DeviceFault
from serve.errors import TandemError
from serve.image.forward import Forward, NewPrompt
from serve.ranks.group import RankGroup

# Legend: R rows of a forward, B images, C latent channels, H and W latent height and width


class RankedDiT:
    """A `DiT` of which this process is the driver."""

    def __init__(self, model: DiT, part: Part, group: RankGroup):
        """`model` was loaded with this rank's `part` for its transformer."""
        self._model = model
        self._part = part
        self._group = group
        self._numbers: WeakKeyDictionary[Conditioning, int] = WeakKeyDictionary()
        """Of the prompts that the peers have, as long as anybody here has them."""
        self._sent: set[int] = set()
        self._next_number = 0

    @property
    def spec(self) -> DiTSpec:
        return self._model.spec

    @property
    def num_parameters(self) -> int:
        return self._model.num_parameters + self._part.num_parameters_elsewhere

    def check_prompt(self, prompt: str) -> None:
        self._model.check_prompt(prompt)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self._model.latent_shape(width, height)

    def num_tokens(self, width: int, height: int) -> int:
        return self._model.num_tokens(width, height)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        return self._model.encode(prompts)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._model.decode(latents_BCHW)

    @property
    def group(self) -> RankGroup:
        return self._group

    def predict(self, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """Raises DeviceFault, whatever fails."""
        new = self._number(conditioning)
        forward = Forward(
            tuple(latents_RCHW.shape[1:]),
            [self._numbers[row] for row in conditioning],
            [NewPrompt(self._numbers[row], _describe(row)) for row in new],
            self._forget(),
        )
        grid = self._part.grid
        try:
            self._group.tell(forward.to_bytes())
            for row in new:
                for tensor in row.tensors.values():
                    grid.broadcast_(tensor.contiguous())
            grid.broadcast_(torch.cat((latents_RCHW.flatten(), times_R)))
            output_RCHW = self._part.predict(latents_RCHW, times_R, conditioning)
        except Exception as error:
            cause = self._group.explain(error)
            is_told = isinstance(cause, TandemError)
            raise DeviceFault(f"{cause}" if is_told else f"a step failed on the driver: {cause!r}") from error
        assert output_RCHW is not None, "the driver has the prediction"
        return output_RCHW

    def _number(self, conditioning: Sequence[Conditioning]) -> list[Conditioning]:
        """Those that had no number yet."""
        new = [row for row in dict.fromkeys(conditioning) if row not in self._numbers]
        for row in new:
            self._numbers[row] = self._next_number
            self._sent.add(self._next_number)
            self._next_number += 1
        return new

    def _forget(self) -> list[int]:
        """Numbers whose prompts nobody here has any more."""
        gone = self._sent.difference(self._numbers.values())
        self._sent -= gone
        return sorted(gone)


def _describe(conditioning: Conditioning) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in conditioning.tensors.items()
    }
