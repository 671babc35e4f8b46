"""The documents in rows of token ids: each ends with the end-of-text id, and a row's first tokens begin one."""

import torch
from torch import Tensor

UNSCORED = -100
"""The target of a position without a term, as torch's cross_entropy knows it."""


def places_in_documents(tokens: Tensor, end: int) -> Tensor:
    """Return each token's place in its document, from 0, for ids (rows, length)."""
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    begins = torch.zeros_like(places)
    begins[:, 1:] = torch.where(tokens[:, :-1] == end, places[:, 1:], 0)
    return places - begins.cummax(dim=1).values


def targets_in_documents(tokens: Tensor, end: int) -> Tensor:
    """Return the next token of each but the last, (rows, length - 1); UNSCORED where it begins another document."""
    return tokens[:, 1:].masked_fill(tokens[:, :-1] == end, UNSCORED)
