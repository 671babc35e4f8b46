"""Load a run's model before anything else is done for it: what is wrong with it is known before hours of tokenizing."""

from relora_train.devices import check_devices
from relora_train.method.targets import check_targets
from relora_train.method.wrap import apply_relora
from relora_train.process import Emit, serve_request
from relora_train.training.model_trial import check_layers_are_called
from relora_train.training.models.kinds import CAUSAL_LM
from relora_train.training.models.registry import objective_of
from relora_train.training.requests import ModelCheckRequest


def check_model(request: ModelCheckRequest, emit: Emit) -> None:
    """Raise what the first stage that needs it would: DeviceError, errors of loading, targets and ranks.

    Covers no file of a checkpoint but its config.json, and no tokenizer: there may be none yet.
    """
    profile = request.profile
    check_devices(profile.launch)
    objective = objective_of(profile)
    if request.config_directory is not None:
        model = objective.load_skeleton(request.config_directory)
    elif profile.model.pretrained is not None:
        model = objective.load_pretrained()
        objective.check_fits(model, None)
    else:
        return  # a model of ours, of which all is known without torch
    if not request.low_rank:
        return
    relora = profile.relora
    if request.config_directory is not None or objective.kind is not CAUSAL_LM:
        check_targets(model, relora.target_modules, rank=relora.rank)
    else:  # its values are here
        apply_relora(
            model, rank=relora.rank, alpha=relora.alpha, dropout=0, target_modules=relora.target_modules, seed=0
        )
        check_layers_are_called(model)


if __name__ == "__main__":
    serve_request(ModelCheckRequest, check_model)
