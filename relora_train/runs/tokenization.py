"""An estimate of the time and disk that tokenizing takes, before anything starts: rates are measured, sizes are known.

The rates are those of tests/benchmarks/RESULTS.md, on one core of an AMD EPYC: other machines differ.
"""

from pathlib import Path

from relora_train.data.source_files import list_files
from relora_train.errors import ReLoRAError
from relora_train.settings.base import FrozenConfig
from relora_train.settings.data import FILE_SOURCES, DataConfig

READ_BYTES_PER_SECOND = 65e6
"""One process reads the source and cuts it into ranges, whoever encodes them."""
ENCODED_BYTES_PER_SECOND = {"tiktoken": 11.6e6, "tokenizers": 3.6e6}
TOKEN_BYTES_PER_BYTE = 0.56
"""Bytes of tokens for each byte of text: two a token, 3.6 bytes of text behind one."""

_HUB_DOCUMENTS = {("allenai/c4", "en"): (364_868_892, 2_270)}
"""Documents and their mean size in bytes. C4's 305 GB are of compressed files, which hold 828 GB of text."""


class TokenizationEstimate(FrozenConfig):
    """The cost of tokenizing all of a source, without the transfers to and from a store."""

    text_bytes: float
    hours_by_workers: dict[int, float]
    """Hours, by the number of workers; one worker is one core."""

    disk_bytes: float
    """On the flow's machine at most: the text, which is freed range by range, and the tokens."""


def estimate_tokenization(data: DataConfig) -> TokenizationEstimate | None:
    """Return the estimate for files on this machine and data sets of known size, or None."""
    sizes = [_text_bytes(part) for part in data.parts()]
    if None in sizes:
        return None
    size = sum(part for part in sizes if part is not None)
    rate = ENCODED_BYTES_PER_SECOND["tokenizers" if data.engine == "tokenizers" else "tiktoken"]
    workers = sorted({1, 8, 64} | ({data.workers} if data.workers else set()))
    hours = {count: (size / READ_BYTES_PER_SECOND + size / rate / count) / 3600 for count in workers}
    return TokenizationEstimate(text_bytes=size, hours_by_workers=hours, disk_bytes=size * (1 + TOKEN_BYTES_PER_BYTE))


def _text_bytes(data: DataConfig) -> float | None:
    if data.source == "hub":
        known = _HUB_DOCUMENTS.get((data.hub_id or "", data.hub_config or ""))
        return known and float(min(known[0], data.max_documents or known[0]) * known[1])
    if data.source not in FILE_SOURCES or data.max_documents or any("://" in path for path in data.paths):
        return None
    try:
        return sum(Path(file.name).stat().st_size for file in list_files(data.paths, data.source))
    except (ReLoRAError, OSError):
        return None  # whoever reads them tells why
