"""The side a document goes to, training or validation, and the places at which a long one is cut.

A hash of its normalised text decides: lower case, ASCII white space removed. Documents that differ in nothing else land
on the same side. If that leaves a side empty, `side_for` moves the nearest one there. An example counts as its parts
with `PART` between them.

The cut is before a single space between two other characters, where no byte-level BPE has a token across. If the text
has none, it is between any two characters.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

PIECE_BYTES = 1 << 18
DOCUMENT_BYTES = 8192
"""Size of the documents that long ones are cut into, where there are too few to hold some out."""

SPLIT_RULE = "blake2b-64 of the text in lower case without ASCII white space"

PART = "\ufdd0"
"""Between the parts of an example where its digest is made: one of Unicode's noncharacters, which no part may hold."""

_ASCII_WHITE_SPACE = b" \t\n\r\v\f"
_COUNTED_DIGESTS = 1 << 18

Split = Literal["train", "val"]
Side = Callable[[int], Split]
"""The side a document's digest puts it on."""


def split_digest(parts: str | Sequence[str]) -> int:
    """Return 64 bits of the normalised text: the same for documents that differ only in case and white space."""
    digest = hashlib.blake2b(digest_size=8)
    for number, text in enumerate([parts] if isinstance(parts, str) else parts):
        # Never joined: PART in it would make an ASCII text twice as large, and all that is done with it slower.
        digest.update(PART.encode() if number else b"")
        start, is_ascii = 0, text.isascii()
        while start < len(text):
            # In slices, so that a long text needs no second copy. The lower case of Greek sigma depends on its word.
            end = start + PIECE_BYTES if is_ascii else text.find(" ", start + PIECE_BYTES)
            part = text[start:end] if end >= 0 else text[start:]
            digest.update(part.lower().encode().translate(None, _ASCII_WHITE_SPACE))
            start += len(part)
    return int.from_bytes(digest.digest(), "big")


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
    """Yield the text as UTF-8 in pieces of at most `limit_bytes`; joined, they are the text.

    A long text is encoded a piece at a time: it needs no second copy.
    """
    start = 0
    while len(encoded := text[start : start + limit_bytes + 1].encode()) > limit_bytes:
        # without the character that the limit cuts in two
        window = encoded[:limit_bytes].decode(errors="ignore")
        piece = window[: _last_single_space(window) or len(window)]
        yield piece.encode()
        start += len(piece)
    yield encoded


def _last_single_space(text: str) -> int:
    """Return the place of the last space between two other characters; 0 where there is none."""
    place = text.rfind(" ", 0, len(text) - 1)
    while place > 0 and (text[place - 1].isspace() or text[place + 1].isspace()):
        place = text.rfind(" ", 0, place)
    return max(0, place)


class DuplicateCounter:
    """Counts digests seen before, in bounded memory: when there are too many, every second one is left out."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._mask = 0

    def add(self, digest: int) -> None:
        if digest & self._mask:
            return
        self._seen[digest] = self._seen.get(digest, -1) + 1
        while len(self._seen) > _COUNTED_DIGESTS:
            self._mask = self._mask << 1 | 1
            self._seen = {d: count for d, count in self._seen.items() if not d & self._mask}

    @property
    def estimate(self) -> int:
        return sum(self._seen.values()) * (self._mask + 1)
