"""Types of a flow's parameters: a form shows them, and a wrong value is refused when a run is created.

The patterns are JSON Schema as well, so that Prefect's server checks them when a run is created: an address with
credentials is refused before anything records it. The first seconds of the run find out the rest: if a thing exists,
and if it fits.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from relora_train.checkpoints.layout import RUN_ID_PATTERN
from relora_train.checkpoints.series_record import SERIES_PATTERN
from relora_train.experiments.experiment import list_experiments
from relora_train.settings.base import WithoutSecrets
from relora_train.settings.load import list_profiles

_SHIPPED = "|".join(re.escape(path.stem) for path in list_profiles())

ProfileName = Annotated[str, Field(pattern=rf"^({_SHIPPED}|.*\.toml)$"), WithoutSecrets()]
"""A shipped profile's name, or a path that ends in .toml."""

_EXPERIMENTS = "|".join(re.escape(path.stem) for path in list_experiments())

ExperimentName = Annotated[str, Field(pattern=rf"^({_EXPERIMENTS}|.*\.toml)$"), WithoutSecrets()]
"""A shipped experiment's name, or a path that ends in .toml."""

Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
"""One run of every arm for each."""

StageName = Annotated[str, Field(pattern=r"^(warm-start|lora|(cycle|full)-[1-9][0-9]*)$")]
"""warm-start, cycle-2, full-3 or lora."""

PretrainDeployment = Annotated[str, Field(pattern=r"^pretrain/.+$")]
"""A deployment of the flow pretrain, as FLOW/NAME."""

RunId = Annotated[str, Field(pattern=rf"^{RUN_ID_PATTERN}$")]
"""A name that can be a folder and a part of a URI."""

SeriesName = Annotated[str, Field(pattern=rf"^{SERIES_PATTERN}$")]
"""A name that can be a folder and a part of a URI."""

CheckpointName = Annotated[
    str, Field(pattern=rf"^((series:)?{RUN_ID_PATTERN}(@[A-Za-z0-9-]+)?|.*/.*|\.\.?)$"), WithoutSecrets()
]
"""RUN, RUN@latest, RUN@cycle-2, RUN@warm-start, RUN@step-400, series:NAME, or a checkpoint's URI or directory."""

StoreUri = Annotated[str, Field(pattern=r"^(s3://[^/]+.*|file://.*|memory://.+|[.~/].*|[^:]+)$"), WithoutSecrets()]
"""A directory, file:// or s3://bucket/prefix; no other scheme."""

TaskNames = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
"""Names of tasks or groups of lm-evaluation-harness."""

TaskDirectory = Annotated[str, Field(min_length=1), WithoutSecrets()]
"""A directory with YAML files of tasks."""

Documents = Annotated[int, Field(ge=1)]
"""So many documents of each task."""

LimitName = Annotated[str, Field(min_length=1)]
"""Name of a global concurrency limit of Prefect."""
