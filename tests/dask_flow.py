"""A flow that only tokenizes, importable by the workers of a Dask cluster."""

from prefect import flow

from relora_train.runs.datasets import DatasetOutcome
from relora_train.runs.run import Run
from relora_train.settings.profile import Profile
from tasks.observe import done
from tasks.run import tokenize


@flow(persist_result=False)
def tokenize_only(store_uri: str, profile: Profile) -> DatasetOutcome:
    """The beginning of a pretrain, with parameters like its own."""
    return done(tokenize(Run("run", store_uri, profile), None))
