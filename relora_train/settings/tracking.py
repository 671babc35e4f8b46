"""Settings of trackers: who is told of a run while it goes."""

from typing import Literal

from pydantic import Field

from relora_train.settings.base import Address, FrozenConfig

TrackerName = Literal["trackio", "tensorboard", "wandb"]


class TrackingConfig(FrozenConfig):
    """Trackers that are told of a run by their own clients; none when absent. Changes no weight."""

    to: tuple[TrackerName, ...] = ()
    """'trackio', 'tensorboard' (files on the flow's machine), 'wandb' (sends, unless WANDB_MODE=offline)."""

    project: str = Field("relora-train", min_length=1)
    """The name under which trackers gather runs."""

    directory: Address | None = None
    """The place of their files on the flow's machine; `tracking` in the cache when absent."""
