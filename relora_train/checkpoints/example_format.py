"""The form of a dataset's examples, as its manifest says it."""

from typing import Literal

from relora_train.settings.base import FrozenConfig


class ExampleFormat(FrozenConfig):
    """Examples instead of plain text. The .ends file of a shard has an entry for each, two for a pair."""

    kind: Literal["messages", "prompts", "labels"]
    before: tuple[int, ...]
    """Token ids that stand before a text where it is read whole."""
    between: tuple[int, ...]
    """Between two texts."""
    after: tuple[int, ...]
    pairs: bool = False
    """True if each label is of two texts."""
    classes: tuple[str, ...] = ()
    """Names in the order of their numbers."""
