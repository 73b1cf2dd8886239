"""Uploads a finished export to the Hugging Face hub, where a run was asked to: the only thing here that reaches out of
the machine besides the teacher, and never in offline mode.
"""

from __future__ import annotations

from pathlib import Path

from student_trainer.checkpoint import CheckpointConfig


class PushError(RuntimeError):
    """The hub did not take the student; it is on disk, and the message says where."""


def check(config: CheckpointConfig) -> None:
    """Raises ValueError for a name that the hub can't have, or where hub access is turned off."""
    if not config.push_to_hub:
        return
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(config.push_to_hub)
    except HFValidationError as error:
        raise ValueError(f"checkpoint.push_to_hub: got {config.push_to_hub!r}, expected user/name: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"checkpoint.push_to_hub: got {config.push_to_hub} in offline mode (HF_HUB_OFFLINE), expected none"
        )


def push(folder: Path, config: CheckpointConfig) -> str:
    """Uploads what is in `folder` as one commit to the repository `push_to_hub`, made if it is not there; its address.

    Raises:
        PushError: it could not be done.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Which HTTP library raises depends on the hub client's version; its own errors are of that library's family.
    http_error: type[Exception] = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
    api = HfApi()
    try:
        api.create_repo(config.push_to_hub, private=config.hub_private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=config.push_to_hub, folder_path=folder, commit_message="Upload the distilled student"
        )
    except (OSError, ValueError, http_error) as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise PushError(
            f"checkpoint.push_to_hub: {config.push_to_hub} could not be written: {cause}; the student is in {folder}; "
            "run the same command again to upload it"
        ) from error
    return str(commit.repo_url)
