"""The content of a run's report as plain records; `collect.py` fills them from checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relora_train.reports.ranks.cycles import CycleHistory
from relora_train.reports.ranks.measures import LayerSpectrum
from relora_train.settings.objectives import Measure, Objective, measures_in

TRAIN_NUMBERS = (
    "loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_seen", "lora_A_grad_norm", "lora_B_grad_norm",
    "lora_A_update_norm", "lora_B_update_norm", "relative_weight_change",
)  # fmt: skip
TRAIN_RECORD = np.dtype([("step", np.int64), *((name, np.float64) for name in TRAIN_NUMBERS)])
"""The numbers of training records, sorted by step, one per step; a number that a record lacks is NaN."""


class RateCurve(NamedTuple):
    """The learning rate by step, and where it comes from."""

    steps: NDArray[np.int64]
    rates: NDArray[np.float64]
    source: str


NO_RATES = RateCurve(np.array([], dtype=np.int64), np.array([]), "")

TrainCurve = np.recarray[Any, np.dtype[Any]]
"""The training records of all stages, as TRAIN_RECORD; steps are updates done, from 1."""


@dataclass(frozen=True)
class Scores:
    """A held-out evaluation. A number may be infinite or NaN; a missing one is None."""

    val_loss: float | None = None
    val_perplexity: float | None = None
    bits_per_byte: float | None = None
    val_accuracy: float | None = None
    val_f1: float | None = None
    val_masked_perplexity: float | None = None
    val_exact_match: float | None = None

    def of(self, measure: Measure) -> float | None:
        """Return the number of this measure."""
        value: float | None = getattr(self, measure.key)
        return value


@dataclass(frozen=True)
class StageWork:
    """How and where a stage was trained. What its checkpoint does not tell is None or empty."""

    began: datetime
    """In UTC: of the first attempt that is recorded; otherwise the end less the seconds of training."""
    ended: datetime
    attempts: tuple[Mapping[str, Any], ...] = ()
    """Each with `at`, `device`, `ranks` and the `step` that it began or went on from."""
    peak_bytes: int | None = None
    """The most memory that training held on its first rank."""
    tokens_per_second: float | None = None
    """The median of the training records."""
    flops_per_token: int | None = None
    """Forward and backward, counted from the settings."""
    peak_flops: float | None = None
    """Dense bfloat16 FLOP/s of all its devices, by their data sheet."""
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def flops(self) -> float | None:
        """FLOP/s reached while training."""
        known = self.flops_per_token is not None and self.tokens_per_second is not None
        return (self.flops_per_token or 0) * (self.tokens_per_second or 0.0) if known else None

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        own = {key: value for key, value in vars(self).items() if key not in ("began", "ended")}
        times = {name: getattr(self, name).isoformat(timespec="seconds") for name in ("began", "ended")}
        return {**times, **own, "flops": self.flops, "mfu": self.mfu}

    @property
    def mfu(self) -> float | None:
        return self.flops / self.peak_flops if self.flops is not None and self.peak_flops else None


@dataclass(frozen=True)
class StageRow:
    """One stage, as its checkpoint tells it."""

    stage: str
    run_id: str
    uri: str
    parent_uri: str | None
    start_step: int
    end_step: int
    cycle: int
    tokens: int | None
    """Tokens of this stage alone; None when neither the parent nor the batch geometry is known."""
    seconds: float
    before: Scores
    after: Scores
    rank: int | None
    """Rank of the stage's low-rank update; None for full-rank stages."""
    fingerprint: str
    size_bytes: int
    divergence: Mapping[str, Any] = field(default_factory=dict)
    """The manifest's record: empty unless the stage diverged and was trained at a lower learning rate."""
    work: StageWork | None = None

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step

    @property
    def tokens_per_second(self) -> float | None:
        """Over the stage's whole time, evaluation and merge included."""
        return self.tokens / self.seconds if self.tokens is not None and self.seconds > 0 else None


@dataclass(frozen=True)
class MergeRow:
    """One merge: what it changed, and what it must not have changed."""

    stage: str
    step: int
    cycle: int
    max_relative_output_change: float | None
    relative_update_norm: float | None
    effective_rank: float | None
    optimizer_state_zeroed: float | None
    """Share of A's and B's optimizer state, 0 to 1."""
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint scored by the evaluation task, on more sequences than the trainer's own check."""

    checkpoint_uri: str
    stage: str
    step: int
    scores: Scores
    val_tokens: int | None


@dataclass(frozen=True)
class Sample:
    """A continuation the model of a checkpoint wrote."""

    stage: str
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class SourceRow:
    """One source of a mixture, up to the run's last checkpoint."""

    name: str
    weight: str
    tokens: int
    share: float
    """Its part of the tokens trained on."""
    epochs: float


@dataclass(frozen=True)
class RelativeRow:
    """Another run that is tied to this one by a checkpoint."""

    run_id: str
    tie: str
    """Parent, sibling or branch, and at which checkpoint."""


@dataclass(frozen=True, eq=False)
class RunData:
    """Everything a report shows. Rows are in the order of the line."""

    run_id: str
    profile: str
    method: str
    stages: tuple[StageRow, ...]
    train: TrainCurve
    merges: tuple[MergeRow, ...]
    evaluations: tuple[Evaluation, ...]
    samples: tuple[Sample, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    dataset_id: str
    dataset_uri: str
    finished_at: datetime
    """When the last checkpoint was made, in UTC."""
    task_scores: tuple[Mapping[str, Any], ...] = ()
    """Scores by tasks of lm-evaluation-harness, as recorded, with stage and step."""
    sources: tuple[SourceRow, ...] = ()
    """The sources of a mixture."""
    left_out: tuple[str, ...] = ()
    """Sentences that say which records and examples were not trained on, or not whole."""
    data_facts: tuple[tuple[str, str], ...] = ()
    """The facts about the dataset and its reading, as name and value."""
    relatives: tuple[RelativeRow, ...] = ()
    rates: RateCurve = NO_RATES
    spectra: tuple[LayerSpectrum, ...] = ()
    """Spectra of the update between the two stages of `spectra_between`."""
    spectra_between: tuple[str, str] | None = None
    history: CycleHistory | None = None
    """The rank of that update from cycle to cycle, and how the cycles' subspaces overlap, from the adapters."""
    spectra_notes: tuple[str, ...] = ()
    """The parts that were left out, with reasons."""

    @property
    def records_not_finite(self) -> int:
        """Training records whose loss is infinite or NaN."""
        return int(np.count_nonzero(~np.isfinite(self.train["loss"])))

    @property
    def measures(self) -> Objective:
        recorded = {name: score for name, score in vars(self.stages[-1].after).items() if score is not None}
        return measures_in(recorded)
