"""Load a run's model before anything else is done for it: what is wrong with it is known before hours of tokenizing."""

from relora_train.devices import check_devices
from relora_train.method.wrap import check_targets
from relora_train.process import Emit, serve_request
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
    if request.low_rank:
        check_targets(model, profile.relora.target_modules, rank=profile.relora.rank)


if __name__ == "__main__":
    serve_request(ModelCheckRequest, check_model)
