"""Builds the stages of a Dockerfile without a container engine: layers of overlayfs over this machine's root directory,
which stands for the base image. COPY, RUN, ENV and the others do what they say, with their absolute paths and as root.

Offline, what pip would fetch is this environment's: a stage's environment is given its packages, and the step counts
as replaced. Needs Linux, root and unshare(1).
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
PACKAGES = "/packages"
"""Where a root directory shows this environment's packages, offline."""
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
CHROOT = shutil.which("chroot") or "/usr/sbin/chroot"  # not every user's PATH has it
HIDDEN = ("/tmp", "/run", "/dev/shm")
"""Directories of this machine that a base image does not have filled."""


@dataclass
class Stage:
    name: str
    parent: str  # a stage, or an image
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, its value)

    def last(self, instruction: str) -> str:
        return [value for name, value in self.steps if name == instruction][-1]


def stages_of(dockerfile: Path) -> dict[str, Stage]:
    parser = DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes()))
    stages: dict[str, Stage] = {}
    for step in parser.structure:
        if step["instruction"] == "FROM":
            parent, _, name = re.fullmatch(r"(\S+)(\s+AS\s+(\S+))?", step["value"]).groups()  # type: ignore[union-attr]
            stages[name] = stage = Stage(name, parent)
        elif step["instruction"] != "COMMENT":
            stage.steps.append((step["instruction"], step["value"]))
    return stages


def chain(stages: Mapping[str, Stage], name: str) -> list[Stage]:
    """The stages that `name` is built on, the first first, itself last."""
    stage = stages[name]
    return [*(chain(stages, stage.parent) if stage.parent in stages else []), stage]


def pairs(value: str) -> dict[str, str]:
    """Of `ENV A=b C="d e"`."""
    return dict(word.split("=", 1) for word in shlex.split(value.replace("\\\n", " ")))


def environment_of(stages: Mapping[str, Stage], name: str) -> dict[str, str]:
    """What ENV says in a stage and those under it."""
    result = {"PATH": BASE_PATH}
    for stage in chain(stages, name):
        for instruction, value in stage.steps:
            if instruction == "ENV":
                result |= {key: text.replace("$PATH", result["PATH"]) for key, text in pairs(value).items()}
    return result


def setting(stages: Mapping[str, Stage], name: str, instruction: str) -> str:
    """The last value of USER, ENTRYPOINT, … in a stage and those under it."""
    found = [value for stage in chain(stages, name) for step, value in stage.steps if step == instruction]
    return found[-1]


def exec_form(value: str) -> list[str]:
    words = json.loads(value)
    assert isinstance(words, list), value
    return words


def context(target: Path) -> Path:
    """The build context as .dockerignore leaves it: everything is ignored but what is named."""
    first, *lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*", "everything is ignored first"
    left_out = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    named = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert len(named) + len(left_out) == len(lines), lines
    target.mkdir()
    for name in named:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns(*left_out))
        else:
            shutil.copy2(ROOT / name, target / name)
    return target


class Build:
    """The stages of one Dockerfile, each built when it is first wanted.

    Args:
        online: pip and apt fetch what they are told to; else this environment's packages stand for it, and the steps
            are listed in `replaced`.
        dry: fetching commands of these stages only say what they would install.
    """

    def __init__(self, dockerfile: Path, work: Path, *, online: bool, dry: tuple[str, ...] = ()) -> None:
        self.stages = stages_of(dockerfile)
        self.replaced: list[str] = []
        self._online, self._dry = online, dry
        self._work = work
        self._context = context(work / "context")
        self._base = self._make_base()

    def layer(self, name: str) -> Path:
        """What a stage adds to this machine's root directory, those under it included. Builds it if it is missing."""
        own = self._work / "layers" / name
        if not own.exists():
            parent = self.stages[name].parent
            below = self.layer(parent) if parent in self.stages else self._base
            own.parent.mkdir(exist_ok=True)
            # overlayfs takes no two lower directories of which one is in the other, so a stage begins with a copy
            subprocess.run(["cp", "-a", "--reflink=auto", below, own], check=True)
            self._run_steps(self.stages[name], own)
        return own

    def _make_base(self) -> Path:
        """What makes this machine's root directory a Python image: this Python in /usr/local, for every user."""
        base = self._work / "base"
        local = base / "usr/local"
        version = f"python3.{sys.version_info.minor}"
        prefix = Path(sys.base_prefix)
        for name in ("bin", "lib", "include"):
            (local / name).mkdir(parents=True)
        shutil.copy2(prefix / "bin" / version, local / "bin" / version)
        (local / "bin/python").symlink_to(version)
        (local / "bin/python3").symlink_to(version)
        (local / "lib" / version).symlink_to(prefix / "lib" / version)
        (local / "include" / version).symlink_to(prefix / "include" / version)
        for parent in [*(prefix / "lib").parents][:-1]:  # a user may pass through, though here it may be root's home
            (base / str(parent).strip("/")).mkdir(parents=True, exist_ok=True)
            (base / str(parent).strip("/")).chmod(0o755)
        (base / PACKAGES.strip("/")).mkdir()
        return base

    def _run_steps(self, stage: Stage, upper: Path) -> None:
        directory, arguments = "/", {}
        for ancestor in chain(self.stages, stage.name):
            for instruction, value in ancestor.steps:
                if instruction == "ARG":
                    arguments.update(pairs(value))
                if instruction == "WORKDIR":
                    directory = value
                if ancestor is stage:
                    self._step(stage, upper, instruction, value, directory, arguments)

    def _step(
        self,
        stage: Stage,
        upper: Path,
        instruction: str,
        value: str,
        directory: str,
        arguments: Mapping[str, str],
    ) -> None:
        if instruction == "WORKDIR":
            self._inside(upper, ["mkdir", "-p", value], {}, "/")
        elif instruction == "COPY":
            self._copy(upper, value, directory)
        elif instruction == "RUN":
            environment = {**environment_of(self.stages, stage.name), **arguments}
            self._inside(upper, ["sh", "-ec", self._command(stage, value)], environment, directory)
        else:
            known = {"ARG", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
            assert instruction in known, f"{instruction} is not known here"

    def _command(self, stage: Stage, value: str) -> str:
        """A RUN, or what stands for it here."""
        fetches = "apt-get install" in value or bool(re.search(r"pip install .*(-r |==)", value))
        if self._online and fetches and stage.name in self._dry:
            self.replaced.append(value)
            return f"{value.replace('pip install', 'pip install -q --dry-run')} && {given_packages()}"
        if self._online or not fetches:
            return value
        self.replaced.append(value)
        return "true" if "apt-get" in value else given_packages()

    def _copy(self, upper: Path, value: str, directory: str) -> None:
        words = value.split()
        source = self._context
        if words[0].startswith("--from="):  # what a stage wrote itself: none copies a part of its base image
            source = self.layer(words.pop(0).removeprefix("--from="))
        *names, target = words
        goal = os.path.join(directory, target)
        place = upper / goal.lstrip("/")
        for name in names:
            origin = source / name.lstrip("/")
            assert origin.exists(), f"COPY {value}: no {name} there"
            # of a directory its contents are copied, and a file into a directory that is named with a slash
            whole = goal.endswith("/") or len(names) > 1 or origin.is_dir()
            (place if whole else place.parent).mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", f"{origin}/." if origin.is_dir() else origin, place], check=True)

    def _inside(self, upper: Path, command: list[str], environment: Mapping[str, str], directory: str) -> None:
        words = ["env", "-i", "-C", directory, *(f"{key}={value}" for key, value in environment.items()), *command]
        place = self._work / "root"
        place.mkdir(exist_ok=True)
        script = mount_script(place, upper, self._work / "overlay") + f"exec {CHROOT} {place} {shlex.join(words)}\n"
        done = subprocess.run(["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def given_packages() -> str:
    """A command that has the stage's environment import from PACKAGES, first."""
    line = f"import sys; sys.path.insert(0, '{PACKAGES}')"
    return f'echo "{line}" > "$(echo /opt/preceptor/lib/python3*/site-packages)/packages.pth"'


def mount_script(place: Path, upper: Path, work: Path) -> str:
    """Mounts this machine's root directory with a layer over it, without this checkout and what is in HIDDEN."""
    import grpc

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    packages = Path(grpc.__file__).parents[1]
    lines = [
        f"mount -t overlay overlay -o lowerdir=/,upperdir={upper},workdir={work} {place}",
        f"mount --bind {packages} {place}{PACKAGES}",
        f"mount --rbind /dev {place}/dev",
        f"mount -t proc proc {place}/proc",
    ]
    for hidden in (*HIDDEN, ROOT):
        lines.append(f"[ ! -d {place}{hidden} ] || mount -t tmpfs -o mode=1777 tmpfs {place}{hidden}")
    return "\n".join(lines) + "\n"
