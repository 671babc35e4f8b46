"""The documents in rows of token ids: each ends with the end-of-text id, and a row's first tokens begin one.

Rows of instructions (packed_dataset.py) say themselves where each example begins, and which tokens are to be predicted.

On a GPU attention skips the blocks between documents (flex attention); elsewhere SDPA reads a mask of all pairs.
"""

import logging
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from relora_train.data.packed_dataset import FIRST

_log = logging.getLogger(__name__)

UNSCORED = -100
"""The target of a position without a term, as torch's cross_entropy knows it."""


def places_in_documents(tokens: Tensor, end: int) -> Tensor:
    """Return each token's place in its document, from 0, for ids (rows, length)."""
    return _places(tokens[:, :-1] == end)


def ids_of_rows(rows: Tensor) -> Tensor:
    """Return the token ids in rows that may be of instructions."""
    return torch.where(rows < 0, ~rows, rows) & (FIRST - 1)


def documents_of_rows(rows: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (rows, length), each one's place in its document, and the targets, of rows (rows, length + 1).

    Rows may be of instructions or of plain text, in which all is to be predicted and `end` ends a document.
    """
    ids, packed = ids_of_rows(rows), rows[:, :1] < 0  # a row of instructions begins with an example
    begins = torch.where(packed, rows[:, 1:] < -FIRST, ids[:, :-1] == end)
    targets = ids[:, 1:].masked_fill(begins | (rows[:, 1:] < 0), UNSCORED)
    return ids[:, :-1], _places(begins[:, :-1]), targets


def _places(begins: Tensor) -> Tensor:
    """Return each token's place in its document, where a row's tokens but the first are known to begin one or not."""
    places = torch.arange(begins.shape[1] + 1, device=begins.device).expand(len(begins), -1)
    first = torch.zeros_like(places)
    first[:, 1:] = torch.where(begins, places[:, 1:], 0)
    return places - first.cummax(dim=1).values


def targets_in_documents(tokens: Tensor, end: int) -> Tensor:
    """Return the next token of each but the last, (rows, length - 1); UNSCORED where it begins another document."""
    return tokens[:, 1:].masked_fill(tokens[:, :-1] == end, UNSCORED)


def mask_of_documents(places: Tensor, *, by_blocks: bool) -> Tensor | BlockMask:
    """Return the mask of causal attention inside documents, for the tokens' places in theirs, (rows, length).

    by_blocks: for attend_in_documents on a GPU. Otherwise (rows, 1, length, length), True where a token is read.
    """
    document = (places == 0).cumsum(1)
    if not by_blocks:
        return (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)

    def is_read(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    rows, length = places.shape
    return create_block_mask(is_read, rows, None, length, length, device=str(places.device))


def attend_in_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' SDPA does, causally where there is no mask, or by the blocks of a BlockMask."""
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attend: Any = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return cast(tuple[Tensor, Tensor | None], attend(module, query, key, value, attention_mask, **given))


@cache
def flex_attention_works(device: torch.device) -> bool:
    """Return True if flex attention trains on this device, by a try. It needs Triton; no CPU has its backward pass."""
    if device.type != "cuda":
        return False
    try:
        made = torch.ones(1, 2, 256, 64, device=device, requires_grad=True)
        torch.compile(flex_attention)(made, made, made).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever the tool chain raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        _log.warning("Documents are masked pair by pair: flex attention does not work on %s (%s).", device, reason)
        return False
    return True
