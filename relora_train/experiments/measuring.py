"""Measure an experiment that trains no runs, by its kind. Light; the tutorial imports torch when it is asked for."""

from __future__ import annotations

from relora_train import events
from relora_train.experiments.measured import Measured, MeasuredExperiment, TutorialExperiment
from relora_train.experiments.throughput import measure_throughput


def measure(experiment: MeasuredExperiment) -> tuple[Measured, dict[str, bytes]]:
    """Return what it came to, and its figures as PNG bytes by file name."""
    config = experiment.config
    if isinstance(config, TutorialExperiment):
        from relora_train.experiments.tutorial_report import measure_tutorial

        events.emit("measuring", what=f"{len(config.seeds)} seeds of three arms", done=0, total=1)
        return measure_tutorial(config)
    return measure_throughput(config), {}
