"""Several sources as one stream of examples by weights: example n's source and place in it follow from n alone.

The first source takes example n when n times its share of the weights passes a whole number; what it leaves is cut in
the same way between the others. Weights are fractions, so no rounding adds up: after any number of examples each
source has given its share of them, to within as many examples as there are sources.
"""

from collections.abc import Sequence
from fractions import Fraction

from relora_train.checkpoints.manifest import DatasetManifest

INTERLEAVING_RULE = "cuts by whole numbers of share times position, first source first; 1"

PARTS_FILE = "parts.json"
"""Beside a fetched mixture: the directory of each source's dataset on this machine."""


class Interleaving:
    """The order in which sources take turns. Pure: there is no state to save."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """Weights are positive, and count by their ratio only."""
        self._shares = [weight / sum(weights[number:]) for number, weight in enumerate(weights)]

    def place(self, position: int) -> tuple[int, int]:
        """Return the source of the example at a position, and how many examples that source has given before."""
        left = position
        for source, share in enumerate(self._shares):
            given = _whole(share, left)
            if _whole(share, left + 1) > given:  # always so for the last, whose share is all of the rest
                return source, given
            left -= given
        raise AssertionError("the last source takes what the others leave")

    def counts(self, examples: int) -> list[int]:
        """Return how many of the first `examples` each source gives."""
        counts, left = list[int](), examples
        for share in self._shares:
            counts.append(_whole(share, left))
            left -= counts[-1]
        return counts

    def most(self, examples: int) -> list[int]:
        """Return how many each source gives at most to so many examples in a row, wherever they begin."""
        most, left = list[int](), examples
        for share in self._shares:
            most.append(-_whole(-share, left))
            left -= _whole(share, left)
        return most


def interleaving_of(manifest: DatasetManifest) -> Interleaving:
    """Return the order in which the sources of a mixture take turns."""
    return Interleaving([Fraction(part.weight) for part in manifest.mixture])


def epochs_by_source(manifest: DatasetManifest, examples: int, sequence_length: int) -> dict[str, tuple[int, float]]:
    """Return, for so many examples of training, the tokens that each source gives and how often it is read."""
    counts = interleaving_of(manifest).counts(examples)
    tokens = {part.name: count * sequence_length for part, count in zip(manifest.mixture, counts, strict=True)}
    return {part.name: (tokens[part.name], tokens[part.name] / part.train_tokens) for part in manifest.mixture}


def _whole(share: Fraction, examples: int) -> int:
    return examples * share.numerator // share.denominator
