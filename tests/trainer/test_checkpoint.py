"""What is on disk is whole or is not chosen; what is loaded is what was saved, bit for bit."""

from __future__ import annotations

import ast
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tinymodels import ARCHITECTURES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import checkpoint
from student_trainer.optim import OptimConfig, Optimizer

pytestmark = pytest.mark.slow


def trained(arch: str = "qwen3", seed: int = 0) -> tuple[Any, Optimizer]:
    """A tiny model after one update on random gradients."""
    model = tiny_model(arch, seed=seed)
    optimizer = Optimizer(model.named_parameters(), OptimConfig(learning_rate=0.01), 10)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(0)
    return model, optimizer


def save(run_dir: Path, step: int, model: Any, optimizer: Optimizer, **figures: float) -> Path:
    return checkpoint.save(
        run_dir,
        step,
        model=model,
        tokenizer=tiny_tokenizer(),
        optimizer=optimizer,
        state={"fingerprint": "abc", "figures": figures},
    )


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


SAVED = trained()
"""For tests that look at names alone."""


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_weights_and_optimizer_come_back_bit_for_bit(arch: str, tmp_path: Path) -> None:
    model, optimizer = trained(arch)
    path = save(tmp_path, 1, model, optimizer)
    other, other_optimizer = trained(arch, seed=5)
    checkpoint.load_model_weights(path, other)
    checkpoint.load_optimizer(path, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    first, second = optimizer.state()[0], other_optimizer.state()[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    state = checkpoint.read_state(path)
    assert (state["fingerprint"], state["step"]) == ("abc", 1)


def test_plain_transformers_loads_a_checkpoint_and_an_export(tmp_path: Path) -> None:
    model, optimizer = trained()
    ids = torch.tensor([[2, 3, 4, 5]])
    for path in (
        save(tmp_path, 1, model, optimizer),
        checkpoint.export(tmp_path / "final", model=model, tokenizer=tiny_tokenizer()),
    ):
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert AutoTokenizer.from_pretrained(path).get_vocab() == tiny_tokenizer().get_vocab()


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *trained())
    assert {p.suffix for p in path.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".jinja", ".txt"}


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_never_chosen(damage: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    earlier = save(tmp_path, 1, model, optimizer)
    later = save(tmp_path, 2, model, optimizer)
    assert checkpoint.find_latest(tmp_path) == later
    victim = later / "optimizer.safetensors"
    if damage == "cut":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "flip":
        content = bytearray(victim.read_bytes())
        content[-5] ^= 4
        victim.write_bytes(content)
    elif damage == "remove":
        victim.unlink()
    else:
        (later / "manifest.json").unlink()
    assert checkpoint.find_latest(tmp_path) == earlier
    with pytest.raises(checkpoint.CheckpointError, match="step-00000002"):
        checkpoint.read_state(later)


def test_an_fsync_that_fails_is_a_checkpoint_that_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever flush it is: of a file, of the partial directory, or of the one that holds the checkpoints."""
    model, optimizer = trained()
    earlier = save(tmp_path, 1, model, optimizer)
    flush, calls = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(descriptor) or flush(descriptor))
    save(tmp_path, 2, model, optimizer)
    for failing in range(len(calls)):
        left = iter(range(len(calls)))

        def refuse(descriptor: int, left: Any = left, failing: int = failing) -> None:
            if next(left) == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)
        step = 3 + failing
        with pytest.raises(checkpoint.CheckpointError, match=rf"step-0*{step}: .*Input/output error"):
            save(tmp_path, step, model, optimizer)
        assert checkpoint.problems(earlier) == ""
        latest = checkpoint.find_latest(tmp_path)
        assert latest is not None
        assert checkpoint.read_state(latest)["step"] in (2, step)  # the last flush is of a name that is there


@pytest.mark.parametrize("failing", ["save_file", "_flush", "_flush_directory"])
def test_a_disk_that_refuses_leaves_the_previous_checkpoint(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    earlier = save(tmp_path, 1, model, optimizer)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, failing, full)
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
            save(tmp_path, 2, model, optimizer)
    assert checkpoint.problems(earlier) == ""
    assert checkpoint.find_latest(tmp_path) == earlier
    later = save(tmp_path, 3, model, optimizer)
    assert checkpoint.find_latest(tmp_path) == later
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_full_disk_is_the_cause_that_is_named(tmp_path: Path) -> None:
    """A real one: safetensors reports it in an exception of its own."""
    model, optimizer = trained()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(checkpoint.CheckpointError, match="File too large"):
            save(tmp_path, 1, model, optimizer)
        with pytest.raises(checkpoint.CheckpointError, match="File too large"):
            checkpoint.export(tmp_path / "final", model=model, tokenizer=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_the_same_step_can_be_saved_again_and_old_ones_are_pruned(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (1, 2, 3, 3):
        last = save(tmp_path, step, model, optimizer)
    checkpoint.prune(tmp_path, checkpoint.CheckpointConfig(keep_last=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoint.find_latest(tmp_path) == last


VALUES = {1: 0.3, 2: 0.5, 3: None, 4: 0.5, 5: 0.1, 6: None}
"""A metric by step; None: not measured there."""


@pytest.mark.parametrize(
    ("settings", "kept", "best"),
    [
        ({"keep_last": 1, "keep_top_k": 0}, [6], None),
        ({"keep_last": 1}, [2, 6], 2),
        ({"keep_last": 1, "keep_top_k": 2}, [2, 4, 6], 2),  # of equal ones the earlier is the better
        ({"keep_last": 2, "keep_top_k": 3}, [1, 2, 4, 5, 6], 2),
        ({"keep_last": 1, "keep_top_k": 9}, [1, 2, 4, 5, 6], 2),
        ({"keep_last": 1, "mode": "min"}, [5, 6], 5),
        ({"keep_last": 2, "keep_top_k": 2, "mode": "min"}, [1, 5, 6], 5),
        ({"keep_last": 1, "metric": "loss"}, [6], None),
    ],
)
def test_the_newest_and_the_best_stay(
    settings: dict[str, Any], kept: list[int], best: int | None, tmp_path: Path
) -> None:
    config = checkpoint.CheckpointConfig.model_validate(settings)
    for step, value in VALUES.items():
        save(tmp_path, step, *SAVED, **({} if value is None else {"eval_accuracy": value}))
        checkpoint.prune(tmp_path, config)
    steps = [f"step-{step:08d}" for step in kept]
    assert names(tmp_path) == ([] if best is None else ["best"]) + steps
    if best is not None:
        assert (tmp_path / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
        assert checkpoint.problems(tmp_path / "checkpoints" / "best") == ""


def test_best_moves_on_and_goes_with_its_metric(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "best"
    for step, value in ((1, 0.2), (2, 0.4), (3, 0.3)):
        save(tmp_path, step, *SAVED, eval_accuracy=value, loss=value)
        checkpoint.prune(tmp_path, checkpoint.CheckpointConfig(keep_last=1))
    assert best.resolve().name == "step-00000002"
    AutoModelForCausalLM.from_pretrained(best)
    checkpoint.prune(tmp_path, checkpoint.CheckpointConfig(keep_last=1, metric="loss", mode="min"))
    assert (best.resolve().name, names(tmp_path)) == ("step-00000003", ["best", "step-00000003"])
    checkpoint.prune(tmp_path, checkpoint.CheckpointConfig(keep_last=1, metric="delta"))
    assert names(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}", '{"figures": 1}'])
def test_a_damaged_checkpoint_is_not_the_best(broken: str, tmp_path: Path) -> None:
    save(tmp_path, 1, *SAVED, loss=1.0)
    (save(tmp_path, 2, *SAVED, loss=2.0) / "trainer_state.json").write_text(broken)
    assert [path.name for _, path in checkpoint.ranked(tmp_path, "loss", "max")] == ["step-00000001"]


def test_a_metric_that_no_step_has_is_refused_by_name() -> None:
    config = checkpoint.CheckpointConfig(metric="los")
    with pytest.raises(ValueError, match=r"metric: got 'los', expected eval_accuracy.* delta, loss"):
        checkpoint.require_measured(config, {"loss": 1.0, "delta": 0.0})
    checkpoint.require_measured(checkpoint.CheckpointConfig(metric="loss"), {"loss": 1.0})
    checkpoint.require_measured(checkpoint.CheckpointConfig(), {"loss": 1.0})
    with pytest.raises(ValueError, match=r"metric: got 'eval_acuracy', expected one of eval_accuracy"):
        checkpoint.CheckpointConfig(metric="eval_acuracy")
    with pytest.raises(ValueError, match=r"metric: got 'seconds_wait', expected one that does not depend on the mach"):
        checkpoint.CheckpointConfig(metric="seconds_wait")
    with pytest.raises(ValueError, match=r"mode: got 'min' with keep_top_k 0"):
        checkpoint.CheckpointConfig(mode="min", keep_top_k=0)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *trained())
    other = tiny_model("qwen3", intermediate_size=64)
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        checkpoint.load_model_weights(path, other)


@pytest.mark.slow
def test_killed_while_saving_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """kill -9 at the moments a save passes through; whatever is there under a final name must verify."""
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from student_trainer import checkpoint
        from test_checkpoint import save, trained
        model, optimizer = trained()
        save(Path(sys.argv[1]), 1, model, optimizer)
        name, left = sys.argv[2], int(sys.argv[3])
        original = getattr(checkpoint, name)
        def killing(*args, **kwargs):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(checkpoint, name, killing)
        save(Path(sys.argv[1]), 2, model, optimizer)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "tests/trainer"]), "OMP_NUM_THREADS": "1"}
    for number, (name, call) in enumerate([("save_file", 1), ("_write_json", 2), ("_flush_directory", 1)]):
        run_dir = tmp_path / str(number)
        done = subprocess.run([sys.executable, "-c", script, run_dir, name, str(call)], env=environment, check=False)
        assert done.returncode == -9
        latest = checkpoint.find_latest(run_dir)
        assert latest is not None
        assert json.loads((latest / "manifest.json").read_text())["step"] == 1


class Killed(BaseException):
    """What no handler of ours catches."""


def test_killed_while_exporting_leaves_the_old_or_the_new_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before each change of a name and each removal in turn; the next export heals it."""
    path, calls, at = tmp_path / "final", [0], [0]
    content = {}
    for seed in (1, 2):
        checkpoint.export(tmp_path / str(seed), model=tiny_model("qwen3", seed=seed), tokenizer=None)
        content[seed] = checkpoint.describe(tmp_path / str(seed))
    assert content[1] != content[2]

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == at[0]:
                raise Killed
            return real(*args, **kwargs)

        return call

    ended = False
    while not ended:
        at[0] += 1
        checkpoint.export(path, model=tiny_model("qwen3", seed=1), tokenizer=None)
        calls[0] = 0
        with monkeypatch.context() as patched:
            for owner, name in ((os, "rename"), (Path, "rename"), (os, "unlink"), (os, "rmdir")):
                patched.setattr(owner, name, counted(getattr(owner, name)))
            try:
                checkpoint.export(path, model=tiny_model("qwen3", seed=2), tokenizer=None)
                ended = True
            except Killed:
                pass
        found = [checkpoint.describe(p) for p in tmp_path.iterdir() if p.name.endswith("final")]
        assert content[1] in found or content[2] in found, f"both lost by a kill before change {at[0]}"
        if path.exists():
            assert checkpoint.describe(path) in content.values(), f"what has the name is not whole: change {at[0]}"
        checkpoint.export(path, model=tiny_model("qwen3", seed=2), tokenizer=None)
        assert checkpoint.describe(path) == content[2]
        assert not list(tmp_path.glob(".*"))
    assert at[0] > 3


def test_killed_while_the_only_checkpoint_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in an evaluation saves its step again; with keep_last 1 there is no other to go on from."""
    path, rename = save(tmp_path, 4, *SAVED, loss=0.5), Path.rename
    before = checkpoint.describe(path)

    def killed(source: Path, target: Path) -> Path:
        if source.name.startswith(".partial"):
            raise Killed
        return rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            save(tmp_path, 4, *SAVED, loss=0.25)
    found = checkpoint.find_latest(tmp_path)
    assert found is not None
    assert checkpoint.describe(found) == before
    assert checkpoint.read_state(found)["step"] == 4
    assert checkpoint.find_latest(tmp_path) == found == tmp_path / "checkpoints" / ".old-step-00000004"
    assert save(tmp_path, 4, *SAVED, loss=0.25) == path == checkpoint.find_latest(tmp_path)
    assert names(tmp_path) == [path.name]


def test_an_export_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the new name when the old one is aside."""
    path = checkpoint.export(tmp_path / "final", model=SAVED[0], tokenizer=None)
    before, rename = checkpoint.describe(path), Path.rename

    def failing(source: Path, target: Path) -> Path:
        if source.name.startswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(checkpoint.CheckpointError, match=r"final: .*Input/output error"):
            checkpoint.export(path, model=tiny_model("qwen3", seed=3), tokenizer=None)
    assert checkpoint.describe(path) == before
    assert not list(tmp_path.glob(".*"))


def test_no_code_is_loaded(tmp_path: Path) -> None:
    """T8: nothing in a checkpoint is a pickle, and no module could read one or run the code of a checkpoint."""
    path = save(tmp_path, 1, *SAVED)
    checkpoint.export(tmp_path / "final", model=SAVED[0], tokenizer=tiny_tokenizer(), card="# card\n")
    files = [file for root in (path, tmp_path / "final") for file in root.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja", ".md"}
    for file in files:
        assert file.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), file
    for package in ("student_trainer", "teacher_api", "teacher_server"):
        for source in Path(package).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                    assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "joblib", "shelve"}, source
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    assert not (node.func.attr == "load" and ast.unparse(node.func.value) == "torch"), source
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert ast.unparse(node.value) == "False", source
