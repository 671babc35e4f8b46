"""A model's way to the hub: find out early if it may be written there, then upload a directory."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from relora_train.errors import AccessDeniedError, ConfigError, StorageError, StoreUnavailableError
from relora_train.storage.redaction import masked

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPLACED = ["model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"]
"""Weights of an earlier model, which would be loaded in place of the new ones: they go in the same commit."""


def check_push(repository: str) -> None:
    """Ask the hub if the token may write to OWNER/NAME. Raise an error that says what is missing; nothing is made."""
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise ConfigError(f"--push {repository!r} is no repository of the hub. Write it as OWNER/NAME.")
    if get_token() is None:
        raise ConfigError(
            f"There is no token to push to {repository} with. Set HF_TOKEN to a token that may write, or log in with "
            "`hf auth login`."
        )
    api, owner = HfApi(), repository.partition("/")[0]
    with _talking(api, repository):
        user = api.whoami()
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if owner.lower() not in map(str.lower, owners) or role == "read":
        reads = "may only read" if role == "read" else f"may write to {', '.join(owners)}"
        raise AccessDeniedError(
            f"The token of {user['name']} cannot push to {repository}: it {reads}. Use a token that may write there, "
            "or push to another owner."
        )


def push(directory: Path, names: Sequence[str], repository: str, *, message: str, public: bool) -> str:
    """Upload these files of a directory in one commit and return its URL. A repository that is not there is made.

    Raise AccessDeniedError, StoreUnavailableError or StorageError.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _talking(api, repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=list(names),
            delete_patterns=_REPLACED,
            commit_message=message,
        )
    return commit.commit_url


@contextmanager
def _talking(api: "HfApi", repository: str) -> Iterator[None]:
    """Turn the hub's errors into ours."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    where = masked(f"{api.endpoint}/{repository}")
    try:
        yield
    except OfflineModeIsEnabled:
        raise ConfigError(
            f"HF_HUB_OFFLINE is set, so nothing can be pushed to {where}. Unset it, or leave --push out."
        ) from None
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} cannot be the name of a repository: {error}") from None
    except Exception as error:  # of several HTTP clients and of xet, whichever the hub's version uses
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if not isinstance(cause, HfHubHTTPError):
            raise StoreUnavailableError(
                f"{where} could not be reached, or broke off ({type(cause).__name__}: {masked(str(cause))}). Nothing "
                "was committed there. Check the network and HF_ENDPOINT, then run again."
            ) from None
        status = cause.response.status_code
        said = f"{status}: {masked(cause.server_message or str(cause)).partition(chr(10))[0]}"
        if status in (401, 403, 404):  # the hub hides what a token may not see
            raise AccessDeniedError(
                f"The hub refuses the token for {where} ({said}). Use a token that may write there."
            ) from None
        if status == 429 or status >= 500:
            raise StoreUnavailableError(f"{where} is unavailable ({said}). Run the same later.") from None
        raise StorageError(f"{where} refused the upload ({said}). Correct what it names, then run again.") from None
