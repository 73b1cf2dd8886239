"""Checkpoints on disk: Hugging Face model files, optimizer tensors in safetensors, everything else JSON. No pickle.

A checkpoint is a directory `<run_dir>/checkpoints/step-00000120`. It is written under another name, flushed to disk and
renamed, so one that has its final name is whole; a manifest of sizes and digests says so again when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from student_trainer.forms import lora
from student_trainer.forms.loading import reload
from student_trainer.optim import Optimizer, StateSource
from teacher_api.settings import Section

FORMAT_VERSION = 1
MANIFEST, STATE, OPTIMIZER = "manifest.json", "trainer_state.json", "optimizer.safetensors"
CARD, BEST = "README.md", "best"
ASIDE = ".old-"
"""Before the name of what another takes the place of, until that has the name."""
EVAL_PREFIX = "eval_"
EVAL_METRICS = ("eval_accuracy", "eval_low", "eval_high")
"""What an evaluation adds to metrics.jsonl."""
DISK_ERRORS = (OSError, SafetensorError)
"""How a disk's refusal shows: safetensors has its own exception for it."""


def is_kept(metric: str) -> bool:
    """Whether checkpoints hold this metric. Times are not a step's own: a resumed run would differ by them."""
    return "seconds" not in metric


class CheckpointConfig(Section):
    save_every: int = Field(100, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest stay on disk."""
    keep_top_k: int = Field(1, ge=0)
    """How many of the best by `metric` stay as well; checkpoints/best points at the best one. Only checkpoints of steps
    at which the metric was measured have a place among them: by default those of evaluated steps."""
    metric: str = "eval_accuracy"
    """A metric of metrics.jsonl: one of an evaluation, or of the training step that the checkpoint follows."""
    mode: Literal["max", "min"] = "max"
    """Whether a high or a low `metric` is good."""
    push_to_hub: str = ""
    """Repository of the Hugging Face hub (user/name) that the final student is uploaded to, with the token of
    `hf auth login` or HF_TOKEN; empty: none, and nothing is sent anywhere."""
    hub_private: bool = True
    """Whether that repository, where it is not there yet, is made a private one."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint of output_dir, if there is one; never: refuse to run where one
    is; or the path of a checkpoint of another run to begin from, in an output_dir of its own."""
    accept_new_prompts: bool = False
    """Go on although the prompts are not those this run was trained on so far. Off, that is refused."""

    @model_validator(mode="after")
    def _metric_is_known(self) -> Self:
        if self.metric.startswith(EVAL_PREFIX) and self.metric not in EVAL_METRICS:
            raise ValueError(
                f"metric: got {self.metric!r}, expected one of {', '.join(EVAL_METRICS)}, or a metric of "
                "the training steps"
            )
        if not is_kept(self.metric):
            raise ValueError(
                f"metric: got {self.metric!r}, expected one that does not depend on the machine: times are not kept in "
                "checkpoints"
            )
        if not self.push_to_hub and not self.hub_private:
            raise ValueError("hub_private: got false without push_to_hub, expected both or neither")
        if self.keep_top_k == 0:
            for name in ("metric", "mode"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r} with keep_top_k 0, expected none: nothing is ranked"
                    )
        return self


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written or read; the message names the file and the cause."""


class Saveable(Protocol):
    """What transformers' models and tokenizers have in common."""

    def save_pretrained(self, path: Path | str, /) -> Any: ...


def save(
    run_dir: Path,
    step: int,
    *,
    model: Saveable,
    tokenizer: Saveable | None,
    optimizer: StateSource,
    state: dict[str, Any],
) -> Path:
    """Writes the checkpoint of the weights after `step` updates and returns its path.

    Raises:
        CheckpointError: the disk refused (full, read-only, flush failed). Earlier checkpoints are untouched.
    """
    root = run_dir / "checkpoints"
    final, partial = root / f"step-{step:08d}", root / f".partial-step-{step:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        partial.mkdir()
        _write_model(partial, model, tokenizer)
        tensors, description = optimizer.state()
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial / OPTIMIZER)
        _write_json(partial / STATE, {**state, "step": step, "optimizer": description})
        _write_json(partial / MANIFEST, {"format": FORMAT_VERSION, "step": step, "files": describe(partial)})
        _flush(partial)
        if final.exists():  # the same step again, after a resume from an earlier one
            final.rename(root / f"{ASIDE}{final.name}")
        partial.rename(final)
        _flush_directory(root)
        _remove_leftovers(root)
    except DISK_ERRORS as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"can't write checkpoint {final}: {error}; earlier checkpoints are untouched") from error
    return final


def export(path: Path, *, model: Saveable, tokenizer: Saveable | None, card: str = "") -> Path:
    """Writes model and tokenizer alone, as a Hugging Face directory that plain transformers loads, with a model card
    if there is one. What was at `path` is put aside until the new one has its name: cut off in between, the next export
    puts it back before it begins.

    Raises:
        CheckpointError: the disk refused. What was at `path` is there still.
    """
    partial, old = path.with_name(f".partial-{path.name}"), path.with_name(f"{ASIDE}{path.name}")
    try:
        _put_back(old, path)
        _remove(partial)
        partial.mkdir(parents=True)
        _write_model(partial, model, tokenizer)
        if card:
            (partial / CARD).write_text(card)
        _flush(partial)
        if path.is_dir():
            path.rename(old)
        partial.rename(path)
        _flush_directory(path.parent)
        _remove(old)
    except DISK_ERRORS as error:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            _put_back(old, path)
        raise CheckpointError(f"can't write {path}: {error}") from error
    return path


def copy(source: Path, path: Path) -> None:
    """Copies a directory to where there is none. Atomic as `save`."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        _flush(partial)
        partial.rename(path)
        _flush_directory(path.parent)
    except DISK_ERRORS as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"can't copy {source} to {path}: {error}") from error


def prune(run_dir: Path, config: CheckpointConfig) -> None:
    """Points `best` at the best checkpoint and deletes all but the newest and the best, as `config` says how many.

    Raises:
        CheckpointError: the disk refused. What is kept is untouched.
    """
    root = run_dir / "checkpoints"
    best = ranked(run_dir, config.metric, config.mode)[: config.keep_top_k]
    try:
        if best:
            link = root / f".partial-{BEST}"
            link.unlink(missing_ok=True)
            link.symlink_to(best[0][1].name)
            link.replace(root / BEST)
        elif (root / BEST).is_symlink():
            (root / BEST).unlink()  # of another metric
        kept = {path for _, path in best}
        for path in _steps(root)[config.keep_last :]:
            if path not in kept:
                trash = root / f"{ASIDE}{path.name}"
                path.rename(trash)
                shutil.rmtree(trash)
    except OSError as error:
        raise CheckpointError(f"can't tidy {root}: {error}; its checkpoints are whole") from error


def require_measured(config: CheckpointConfig, figures: Mapping[str, float]) -> None:
    """Raises ValueError where the checkpoints are to be ranked by something that no step measures."""
    if config.keep_top_k and not config.metric.startswith(EVAL_PREFIX) and config.metric not in figures:
        raise ValueError(
            f"checkpoint.metric: got {config.metric!r}, expected {', '.join(EVAL_METRICS)} or one of "
            f"{', '.join(filter(is_kept, sorted(figures)))}"
        )


def ranked(run_dir: Path, metric: str, mode: Literal["max", "min"]) -> list[tuple[float, Path]]:
    """(value, checkpoint) of those at whose step `metric` was measured, best first; of equal ones the earlier."""
    found = []
    for path in reversed(_steps(run_dir / "checkpoints")):
        try:
            value = json.loads((path / STATE).read_text())["figures"].get(metric)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged
        if value is not None:
            found.append((float(value), path))
    return sorted(found, key=lambda pair: pair[0], reverse=mode == "max")


def steps(run_dir: Path) -> list[int]:
    """At which steps there are checkpoints, newest first."""
    return [int(path.name[5:]) for path in _steps(run_dir / "checkpoints")]


def find_latest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files all have the size and digest its manifest says, or None."""
    return find_whole(run_dir)[0]


def find_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """As `find_latest`, and what is wrong with each newer one that was passed over."""
    passed_over: list[str] = []
    for path in _steps(run_dir / "checkpoints"):
        wrong = problems(path)
        if not wrong:
            return path, passed_over
        passed_over.append(wrong)
    for path in _steps(run_dir / "checkpoints", ASIDE):  # cut off while the same step was written again
        if not problems(path):
            return path, passed_over
    return None, passed_over


def problems(path: Path) -> str:
    """What is wrong with the checkpoint at `path`, in one line; empty if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT_VERSION:
            return f"{path} has checkpoint format {manifest['format']}, this version reads {FORMAT_VERSION}"
        for name, expected in manifest["files"].items():
            file = path / name
            if file.stat().st_size != expected["bytes"]:
                return f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}"
            if _digest(file) != expected["blake2b"]:
                return f"{file} does not match its digest: it was changed or damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is not a whole checkpoint: {error}"
    return ""


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's own state, as it was given to `save`, with "step"."""
    wrong = problems(path)
    if wrong:
        raise CheckpointError(wrong)
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def load_model_weights(path: Path, model: torch.nn.Module) -> None:
    """Copies the checkpoint's weights into `model`, bit for bit; raises CheckpointError where they don't fit."""
    if lora.is_adapted(model):
        try:
            lora.load_weights(path, model)
        except (*DISK_ERRORS, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        return
    saved = reload(model, path)
    source, target = saved.state_dict(), model.state_dict()
    different = sorted(
        name
        for name in set(source) | set(target)
        if name not in source or name not in target or source[name].shape != target[name].shape
    )
    if different:
        raise CheckpointError(
            f"{path} holds another model: {len(different)} tensors differ, for example {different[0]}"
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def load_optimizer(path: Path, optimizer: Optimizer) -> None:
    """Restores the optimizer's state from the checkpoint at `path`."""
    description = json.loads((path / STATE).read_text())["optimizer"]
    try:
        optimizer.load_state(load_file(path / OPTIMIZER), description)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _write_model(directory: Path, model: Saveable, tokenizer: Saveable | None) -> None:
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _steps(root: Path, before: str = "") -> list[Path]:
    """Checkpoints that have their final name, or that name with `before` in front of it; newest first."""
    if not root.is_dir():
        return []
    found = {p: p.name.removeprefix(f"{before}step-") for p in root.glob(f"{before}step-*")}
    return sorted((p for p, step in found.items() if step.isdigit()), key=lambda p: int(found[p]), reverse=True)


def _remove_leftovers(root: Path) -> None:
    for path in (*root.glob(".partial-*"), *root.glob(f"{ASIDE}*")):
        _remove(path)


def _remove(path: Path) -> None:
    """A directory with what is in it, or a link to one; nothing where there is none."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _put_back(old: Path, path: Path) -> None:
    """What was put aside, under its name again, or gone where something has the name."""
    if path.exists():
        _remove(old)
    elif old.exists():
        old.rename(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def describe(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file in it, by its path."""
    return {
        str(p.relative_to(directory)): {"bytes": p.stat().st_size, "blake2b": _digest(p)}
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _flush(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in (*(p for p in directory.rglob("*") if p.is_dir()), directory):
        _flush_directory(path)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
