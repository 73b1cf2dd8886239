"""From a directory or hub id to a model: a plain checkpoint, an adapter on one, layers of another model inside, or a
class of the user's own. Every program of the trainer loads its models here, and nothing in a checkpoint is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from student_trainer.forms import graft, lora
from student_trainer.imports import import_named

LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError)
"""What transformers raises for files that are missing, cut short, of another shape or of an unknown architecture."""


class StudentError(ValueError):
    """A student that can't be loaded or trained as configured."""


def locate(key: str, model: str, revision: str = "") -> dict[str, Any]:
    """Arguments of from_pretrained. What looks like a path must be there: a typo is never asked of the hub.

    Args:
        key: the configuration's, which messages name.
    Raises:
        StudentError: no such directory, or none of a model.
    """
    try:
        path = Path(model).expanduser()
        is_there, is_directory = path.exists(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that no file can have, a directory that is closed, ~nobody
        raise StudentError(f"{key} {model[:200]!r} can't be looked up: {error}"[:400]) from error
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if is_directory:
        if not any((path / name).is_file() for name in ("config.json", lora.ADAPTER_CONFIG)):
            raise StudentError(f"{key} {model!r} has no config.json; expected a Hugging Face directory")
        if revision:
            raise StudentError(
                f"student.revision: got {revision!r} with the directory {model!r}, expected none: only a model of the "
                "hub has revisions"
            )
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True, "trust_remote_code": False}
    if is_there or looks_like_path:
        raise StudentError(f"{key} {model!r} is not a directory; expected a checkpoint or a hub id")
    at = {"revision": revision} if revision else {}
    return {"pretrained_model_name_or_path": model, "trust_remote_code": False, **at}


def load_pretrained(key: str, model: str, revision: str = "", model_class: str = "") -> Any:
    """The float32 model that `model` names, on the CPU, all of its weights from there.

    Raises:
        StudentError: nothing there, damaged, not a causal language model, or without some of its weights.
    """
    where = locate(key, model, revision)
    directory = Path(where["pretrained_model_name_or_path"])
    try:
        if (directory / lora.ADAPTER_CONFIG).is_file():
            base, base_revision = lora.base_of(directory)
            loaded = load_pretrained(f"the base of {key}", base, base_revision, model_class)
            return lora.merge_saved(loaded, directory)
        loaded, report = _load(where, model_class)
    except LOAD_ERRORS as error:
        if isinstance(error, StudentError):
            raise
        cause = " ".join(str(error).split())[:300]
        raise StudentError(f"{key} {model!r} can't be loaded: {cause}") from error
    _refuse_random(key, model, report)
    return loaded


def reload(model: Any, directory: Path) -> Any:
    """Another model of the class of `model`, as saved in `directory`, in the dtype of `model`."""
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        return type(model).from_pretrained(str(directory))
    dtype = next(model.parameters()).dtype
    return type(model).from_pretrained(directory, dtype=dtype, local_files_only=True)


def import_class(path: str) -> Any:
    """The class that `package.module:Class` names.

    Raises:
        StudentError: no such class, or it can't be loaded from and saved to a directory.
    """
    try:
        found = import_named(path, "Class", "student.model_class: ")
    except ValueError as error:
        raise StudentError(str(error)) from error
    lacking = [method for method in ("from_pretrained", "save_pretrained") if not hasattr(found, method)]
    if lacking or not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        without = f" without {' and '.join(lacking)}" if lacking else ""
        raise StudentError(
            f"student.model_class: {path!r} is a {type(found).__name__}{without}; expected a torch module class with "
            "from_pretrained and save_pretrained, such as a transformers causal language model"
        )
    return found


def _load(where: dict[str, Any], model_class: str) -> tuple[Any, dict[str, Any]]:
    import transformers

    directory = Path(where["pretrained_model_name_or_path"])
    chosen = import_class(model_class) if model_class else transformers.AutoModelForCausalLM
    if model_class and not issubclass(chosen, transformers.PreTrainedModel):
        return chosen.from_pretrained(str(directory)).float(), {}
    if graft.is_grafted(directory):
        host: Any = chosen if model_class else graft.class_for(graft.read_config(directory))
        chosen = graft.grafted_class(host)
        where = {"pretrained_model_name_or_path": str(directory), "local_files_only": True}
    model, report = chosen.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
    return model, report


def _refuse_random(key: str, model: str, report: dict[str, Any]) -> None:
    """transformers fills in what a checkpoint lacks with random numbers."""
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(what, ())))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise StudentError(
                f"{key} {model!r} has {what.replace('_', ' ')}: {', '.join(names[:3])}{more}; the student would be "
                "partly random"
            )
