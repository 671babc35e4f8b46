"""Every error a user can meet, in one tree; each family has its exit code.

A message says what happened, where, why, and what to do now. It never holds a secret.
"""

import json
from typing import ClassVar


class ReLoRAError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    """True if the same call may succeed later with nothing changed by the user."""
    max_retries: ClassVar[int | None] = None
    """How often it is worth trying again, where that is less often than the caller would."""


# One line an error.
# fmt: off
class ConfigError(ReLoRAError):  # a profile, a setting, an argument
    exit_code = 2
class ProfileNotFoundError(ConfigError): ...
class ProfileInvalidError(ConfigError):
    faults: tuple[str, ...] = ()
    """Each by itself, where there are several."""
class ExperimentInvalidError(ConfigError): ...  # an experiment's arms that cannot be compared
class RunSettingsChangedError(ConfigError): ...  # a run id used again with other settings
class RunInUseError(ConfigError): ...  # another flow writes this run
class DatasetInUseError(ConfigError): ...  # something depends on a dataset that is to be deleted

class DataError(ReLoRAError):  # a corpus or a tokenizer
    exit_code = 3
class SourceUnreadableError(DataError): ...
class CorpusEmptyError(DataError): ...
class CorpusTooSmallError(DataError): ...
class TokenizerError(DataError): ...
class ClusterUnavailableError(DataError):  # the Dask cluster that tokenizes
    retryable = True

class ModelError(ReLoRAError):  # a model's shape or weights
    exit_code = 4
class ModelNotFoundError(ModelError): ...
class ModelUnsuitableError(ModelError): ...  # quantised, incomplete, or made for another task
class NoTargetModulesError(ModelError): ...
class SequenceTooLongError(ModelError): ...
class UntrainedLayerError(ModelError): ...  # a layer that no gradient reaches
class VocabularyMismatchError(ModelError): ...

class StorageError(ReLoRAError):  # a store; missing, denied and unavailable are different
    exit_code = 5
class UnknownStoreSchemeError(StorageError): ...
class ObjectNotFoundError(StorageError): ...
class BucketNotFoundError(ObjectNotFoundError): ...
class AccessDeniedError(StorageError): ...
class StoreUnavailableError(StorageError):
    retryable = True
class PreconditionFailedError(StorageError): ...  # another writer was first
class UnsafeStoreError(StorageError): ...  # the store ignores conditional writes, or alters what is written
class DiskFullError(StorageError): ...

class CheckpointError(ReLoRAError):  # what a store holds is not what was asked for
    exit_code = 6
class CheckpointNotFoundError(CheckpointError): ...
class CheckpointIncompleteError(CheckpointError): ...
class CheckpointCorruptError(CheckpointError): ...
class CheckpointAmbiguousError(CheckpointError): ...

class TrainingError(ReLoRAError):  # the trainer process
    exit_code = 7
class DivergedError(TrainingError): ...
class DeviceError(TrainingError): ...  # no such device
class DeviceMemoryError(DeviceError):  # retried once: another process may have held the memory
    retryable = True
    max_retries = 1
class TrainerCrashedError(TrainingError):
    retryable = True
class TrainerFaultError(TrainingError): ...  # an error in it that comes again each time
class TrainerInterruptedError(TrainingError):
    exit_code = 130

class OrchestratorError(ReLoRAError):  # a Prefect server that is away or answers with an error
    exit_code = 8
    retryable = True
# fmt: on


_COME_AGAIN = (
    ImportError, SyntaxError, NameError, TypeError, AttributeError, ValueError, LookupError, ArithmeticError,
    AssertionError, NotImplementedError, RecursionError,
)  # fmt: skip
_FROM_OUTSIDE = (OSError, EOFError, json.JSONDecodeError)
"""Files, connections, and an answer that was cut off."""


def may_pass(error: BaseException) -> bool:
    """Return True if the same call may succeed later with nothing changed: the one rule of what is tried again.

    Errors of ours say so themselves. Python's errors about code and values follow from what is installed and given, so
    they come again. Reports of a device, of the system or of another process get another chance: RuntimeError, OSError,
    MemoryError and classes of other packages. So does whatever such an error led to.
    """
    if isinstance(error, ReLoRAError):
        return error.retryable
    if not isinstance(error, Exception):
        return False
    if isinstance(error, _FROM_OUTSIDE) or not isinstance(error, _COME_AGAIN):
        return True
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return isinstance(behind, _FROM_OUTSIDE)


def error_named(name: str, message: str) -> ReLoRAError:
    """Rebuild an error that another process reported by class name; unknown names become TrainerCrashedError."""
    pending = [ReLoRAError]
    while pending:
        candidate = pending.pop()
        if candidate.__name__ == name:
            return candidate(message)
        pending.extend(candidate.__subclasses__())
    return TrainerCrashedError(f"{name}: {message}")
