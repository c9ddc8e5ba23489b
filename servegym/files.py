"""Files that appear whole or not at all, and where a result comes from."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

import servegym
from servegym.envs.cluster.spec import parse_cluster
from servegym.envs.costs.profile import profile_path
from servegym.envs.scenario import Scenario
from servegym.errors import InputError

WIDTH = 160
NAME_WIDTH = 25  # of tables: the longest name of a rule with the + behind it, or of a workload


def console() -> Console:
    """Standard output; wide tables keep their width in files and pipes."""
    out = Console()
    return out if out.is_terminal else Console(width=WIDTH)


def folded(name: str) -> str:
    """The name of a system of several rules in lines for a table's column, parted behind a `+`."""
    return "\n".join(textwrap.wrap(name.replace("+", "+ "), NAME_WIDTH)).replace("+ ", "+")


def say(text: str) -> None:
    """Print a line as it is."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """`say` on standard error."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def check_folder(name: str) -> None:
    """Find out before the work that its results can be written.

    Raises:
        InputError: for a path that leads through a file.
    """
    for path in (Path(name), *Path(name).parents):
        if path.exists() and not path.is_dir():
            raise InputError("servegym", "log_folder", name, f"{path} is a file; give a folder")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that no reader sees a half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write safetensors with the mode of any new file, so that a server of another user can read it.

    `save_file` alone gives them 0600.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(arrays), path)
    path.chmod(mode)


def command_line() -> str:
    """The command that runs, as one would type it."""
    program = Path(sys.argv[0])
    name = f"python {program.name}" if program.suffix == ".py" else program.name
    return shlex.join([*name.split(), *sys.argv[1:]])


def git_revision() -> str | None:
    """Commit of the checkout that runs, with `-dirty` for local changes; None outside of a checkout."""
    root = Path(servegym.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def trace_hashes(workload: str) -> dict[str, str]:
    """SHA-256 by path of a workload that is a file; nothing for generators."""
    path = Path(workload)
    return {workload: _sha256(path)} if path.is_file() else {}


def input_hashes(scenario: Scenario) -> dict[str, str]:
    """SHA-256 by name of the files behind a scenario: its trace and the cost profiles of its fleets.

    Raises:
        InputError: for a fleet that cannot be read, or a profile that is not there.
    """
    instances = (i for text in scenario.clusters for i in parse_cluster(text).instances)
    profiles = {name: _sha256(profile_path(name)) for name in sorted({i.profile for i in instances})}
    return trace_hashes(scenario.workload) | profiles


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(path, "file", path.name, f"cannot be read: {error}") from error
