"""Rows of 32-bit words on the device, one for each of some jobs: written once, read by the kernels of many steps."""

from __future__ import annotations

import torch


class SlotTable:
    """Longer and wider when need be: a job's row and what is written of it stay what they are."""

    def __init__(self, width: int, device: torch.device):
        self.words_SW = torch.zeros(16, width, dtype=torch.int32, device=device)
        self._free = list(range(16))

    def take(self, width: int) -> int:
        """A row of at least so many words, of any content."""
        num_rows, old_width = self.words_SW.shape
        if not self._free or width > old_width:
            old_SW = self.words_SW
            grown = num_rows if self._free else 2 * num_rows
            self.words_SW = old_SW.new_zeros(grown, max(old_width, 1 << (width - 1).bit_length()))
            self.words_SW[:num_rows, :old_width] = old_SW
            self._free += range(num_rows, grown)
        return self._free.pop()

    def give_back(self, row: int) -> None:
        """What is queued before the next `take` may still read it."""
        self._free.append(row)
