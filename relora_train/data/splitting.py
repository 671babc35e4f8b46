"""The side a document goes to, training or validation, and the places at which a long one is cut.

A hash of its normalised text decides: lower case, ASCII white space removed. Documents that differ in nothing else land
on the same side. If that leaves a side empty, `side_for` moves the nearest one there.

The cut is before a single space between two other characters, where no byte-level BPE has a token across. If the text
has none, it is between any two characters.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

PIECE_BYTES = 1 << 18
DOCUMENT_BYTES = 8192
"""Size of the documents that long ones are cut into, where there are too few to hold some out."""

SPLIT_RULE = "blake2b-64 of the text in lower case without ASCII white space"

_ASCII_WHITE_SPACE = b" \t\n\r\v\f"
_SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")

Split = Literal["train", "val"]
Side = Callable[[int], Split]
"""The side a document's digest puts it on."""


def split_digest(text: str) -> int:
    """Return 64 bits of the normalised text: the same for documents that differ only in case and white space."""
    normalised = text.lower().encode().translate(None, _ASCII_WHITE_SPACE)
    return int.from_bytes(hashlib.blake2b(normalised, digest_size=8).digest(), "big")


def split_of(digest: int, validation_fraction: float) -> Split:
    """Return the side a document's digest puts it on."""
    return "val" if digest < validation_fraction * 2.0**64 else "train"


def side_for(digests: Iterable[int], validation_fraction: float) -> Side:
    """Return the split rule, changed only where it leaves a side empty: the document nearest to that side goes there.

    With fewer than two different documents nothing can be moved.
    """
    known = sorted(set(digests))
    if len(known) > 1 and split_of(known[0], validation_fraction) == "train":
        return lambda digest: "val" if digest == known[0] else "train"
    if len(known) > 1 and split_of(known[-1], validation_fraction) == "val":
        return lambda digest: "train" if digest == known[-1] else "val"
    return lambda digest: split_of(digest, validation_fraction)


def cut_into_pieces(text: str, limit_bytes: int) -> Iterator[bytes]:
    """Yield the text as UTF-8 in pieces of at most `limit_bytes`; joined, they are the text."""
    encoded = text.encode()
    start = 0
    while len(encoded) - start > limit_bytes:
        # without the character that the limit cuts in two
        window = encoded[start : start + limit_bytes].decode(errors="ignore")
        spaces: list[int] = []
        for begin in (max(0, len(window) - 4096), 0):
            spaces = spaces or [match.start() for match in _SINGLE_SPACE.finditer(window, begin)]
        end = len(window[: spaces[-1] if spaces else len(window)].encode())
        yield encoded[start : start + end]
        start += end
    yield encoded[start:]
