"""Tasks of lm-evaluation-harness, and one score of a task by which models are compared or promoted."""

from typing import Annotated, Literal

from pydantic import Field

from relora_train.settings.base import Address, FrozenConfig
from relora_train.settings.objectives import Measure

TaskScore = Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")]
"""TASK/METRIC, such as lambada_openai/acc; a metric of a filter is METRIC,FILTER."""


class TaskSelection(FrozenConfig):
    """Tasks to score a model by."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks or groups: the harness's own, and those in `include`."""

    include: Address | None = None
    """Directory of YAML files; the paths in them are relative to it."""

    limit: int | None = Field(None, ge=1)
    """Documents of each task; all when absent."""


class TaskMeasure(FrozenConfig):
    """A score of one task."""

    score: TaskScore

    include: Address | None = None
    """Directory of YAML files, for a task that is not the harness's own."""

    limit: int | None = Field(None, ge=1)
    """Documents of the task; all when absent."""

    better: Literal["higher", "lower"] = "higher"
    """The direction of a better model."""

    @property
    def selection(self) -> TaskSelection:
        return TaskSelection(tasks=(self.score.partition("/")[0],), include=self.include, limit=self.limit)

    @property
    def measure(self) -> Measure:
        """The score in tables."""
        return Measure("task_score", self.score, self.score, 4, 4, higher_is_better=self.better == "higher")
