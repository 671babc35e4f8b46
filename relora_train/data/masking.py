"""Tokens that are hidden, as BERT was trained. Which ones follows from an example's place, so they differ each time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HIDDEN = 0.15
"""Share of the tokens that are to be predicted: 80 % of them behind the mask token, 10 % behind another token, 10 % as
they are (arXiv 1810.04805)."""

UNHIDDEN = -1
"""The target of a token that is not to be predicted."""


@dataclass(frozen=True)
class Masking:
    """The ids that masking needs to know."""

    mask_id: int
    vocab_size: int
    markers: tuple[int, ...]
    """Ids that are never hidden, such as those between documents."""

    def hide(self, rows: NDArray[np.int64], draws: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
        """Return rows of inputs and targets, (rows, 2 * length), of token ids (rows, length + 1), the last one unused.

        draws: the seed of each row, so that a row is the same on any rank, in any batch and after a resume.
        """
        length = rows.shape[1] - 1
        out = np.empty((len(rows), 2 * length), dtype=np.int64)
        for row, found, draw in zip(out, rows[:, :-1], draws, strict=True):
            generator = np.random.Generator(np.random.PCG64(draw))
            hidden = (generator.random(length) < HIDDEN) & ~np.isin(found, self.markers)
            how, other = generator.random(length), generator.integers(0, self.vocab_size, length)
            shown = np.where(how < 0.8, self.mask_id, np.where(how < 0.9, other, found))
            row[:length] = np.where(hidden, shown, found)
            row[length:] = np.where(hidden, found, UNHIDDEN)
        return out
