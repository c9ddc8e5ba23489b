"""Checkpoints: a folder of JSON and safetensors, written whole or not at all, checked on the way in.

    policy.safetensors      the network's parameters, named as in `servegym.models.layers`
    config.json             what they are, and the SHA-256 of each file of arrays: see `CheckpointInfo`
    optimizer.safetensors   Adam's moments
    trainer.safetensors     random state, return normaliser, counters of the trainer and of each lane
    env.safetensors         the environment's lanes, as its `save_state` gives them

A checkpoint without the last three plays and is exported, but cannot be resumed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from servegym import __version__
from servegym.agents.ppo.config import PPOConfig
from servegym.agents.task import Task, read_task
from servegym.envs.cluster.schema import schema_hash
from servegym.errors import InputError
from servegym.files import write_arrays
from servegym.models.config import NetworkConfig, read_config
from servegym.models.dense import DenseNetwork

FORMAT = 2
CONFIG, POLICY = "config.json", "policy.safetensors"
OPTIMIZER, TRAINER, ENV = "optimizer.safetensors", "trainer.safetensors", "env.safetensors"
Arrays = Mapping[str, np.ndarray]


def _versions() -> dict[str, str]:
    found = {"servegym": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "numba", "gymnasium", "stable-baselines3"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


@dataclass(frozen=True)
class CheckpointInfo:
    """What config.json says.

    Attributes:
        network, ppo: sizes and hyperparameters.
        task: what was trained on.
        command: how the training was started.
        seed: of the run.
        steps: decisions learned from.
        total_steps: decisions that the run was asked for, towards which the step size anneals.
        schema_hash: of the observation contract.
        versions: of the software that wrote the checkpoint.
        format: of the folder.
        sha256: of each safetensors file, by name; `save_checkpoint` fills it in.
    """

    network: NetworkConfig
    ppo: PPOConfig
    task: Task
    command: str
    seed: int
    steps: int
    total_steps: int
    schema_hash: str = field(default_factory=schema_hash)
    versions: dict[str, str] = field(default_factory=_versions)
    format: int = FORMAT
    sha256: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    folder: str | Path,
    info: CheckpointInfo,
    network: DenseNetwork,
    optimizer: Arrays | None = None,
    trainer: Arrays | None = None,
    env_state: Arrays | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint in place of the one that stood there, so that a crash leaves one of the two whole.

    Args:
        folder: where; missing parents are made.
        info: for config.json.
        network: whose parameters to keep.
        optimizer, trainer, env_state: arrays by name, all three for a checkpoint that can be resumed.
        extra: further text files by name, for example a model card README.md.

    Raises:
        InputError: where `folder` is a file or holds something else than a checkpoint.
    """
    folder = Path(folder).resolve()
    _recover(folder)
    vacant = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not vacant and not (folder / CONFIG).is_file():
        raise InputError(
            folder, "checkpoint folder", folder.name, "holds something else; choose another folder"
        )
    fresh = _sibling(folder, "new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {name: parameter.detach().cpu().numpy() for name, parameter in network.state_dict().items()}
    tensors = {POLICY: weights, OPTIMIZER: optimizer, TRAINER: trainer, ENV: env_state}
    for name, arrays in tensors.items():
        if arrays is not None:
            write_arrays(fresh / name, {k: np.asarray(a, order="C") for k, a in arrays.items()})
    info = replace(info, sha256={path.name: _sha256(path) for path in sorted(fresh.iterdir())})
    for name, text in {**(extra or {}), CONFIG: json.dumps(asdict(info), indent=2) + "\n"}.items():
        (fresh / name).write_text(text, encoding="utf-8")
    _replace(folder, fresh)


def read_info(folder: str | Path) -> CheckpointInfo:
    """Read and check config.json.

    Raises:
        InputError: naming file, field and value, for anything missing, unknown or ill-typed, and for a
            checkpoint of another observation contract or format.
    """
    folder = Path(folder).resolve()
    _recover(folder)
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise InputError(path, "file", error.strerror, "not readable by this user") from error
    except OSError as error:
        raise InputError(path, "file", str(folder), "no checkpoint there") from error
    except ValueError as error:
        raise InputError(path, "JSON", str(error), "damaged; use another checkpoint") from error
    if not isinstance(raw, dict):
        raise InputError(path, "JSON", type(raw).__name__, "expected a table")
    if "format" in raw and raw["format"] != FORMAT:  # its other fields may differ, too
        raise InputError(
            path, "format", raw["format"], f"this version of ServeGym reads {FORMAT}; train anew"
        )
    names = {f.name for f in fields(CheckpointInfo)}
    for name in sorted(names ^ set(raw)):
        hint = "missing" if name in names else "unknown field"
        raise InputError(path, name, raw.get(name), hint)
    for name, kinds in _KINDS.items():
        if not isinstance(raw[name], kinds) or isinstance(raw[name], bool):
            raise InputError(path, name, raw[name], "ill-typed")
    if raw["schema_hash"] != schema_hash():
        hint = f"this version of ServeGym reads {schema_hash()}; train anew"
        raise InputError(path, "schema_hash", raw["schema_hash"], hint)
    for name in ("seed", "steps", "total_steps"):
        if raw[name] < 0:
            raise InputError(path, name, raw[name], "must be >= 0")
    raw["network"] = read_config(NetworkConfig, path, "network", raw["network"])
    raw["ppo"] = read_config(PPOConfig, path, "ppo", raw["ppo"])
    raw["task"] = read_task(path, raw["task"])
    return CheckpointInfo(**raw)


_KINDS: dict[str, Any] = {
    "command": str,
    "seed": int,
    "steps": int,
    "total_steps": int,
    "schema_hash": str,
    "format": int,
    "versions": dict,
    "sha256": dict,
    "task": dict,
}


def read_network(folder: str | Path) -> tuple[DenseNetwork, CheckpointInfo]:
    """The network of a checkpoint.

    Raises:
        InputError: as `read_info`, and for parameters that are missing, unknown, misshapen or not finite.
    """
    info = read_info(folder)
    network = DenseNetwork(info.network)
    path = Path(folder) / POLICY
    weights = read_arrays(path, info)
    check_arrays(path, weights, {name: p.numpy() for name, p in network.state_dict().items()})
    network.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
    return network, info


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_arrays(path: Path, info: CheckpointInfo) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file of the checkpoint that `info` describes.

    Raises:
        InputError: for a file that is missing, damaged, or not the one that was saved.
    """
    if not path.is_file():
        raise InputError(path, "file", path.name, "missing from the checkpoint")
    found, saved = _sha256(path), info.sha256.get(path.name)
    if found != saved:
        hint = f"{CONFIG} says {saved}: damaged or changed; use another checkpoint"
        raise InputError(path, "sha256", found, hint)
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise InputError(path, "safetensors", str(error), "damaged; use another checkpoint") from error


def check_arrays(path: Path, arrays: Arrays, expected: Arrays) -> None:
    """Hold arrays against ones of the right names, shapes and types.

    Raises:
        InputError: naming the first that differs or is not finite.
    """
    for name in sorted(set(arrays) ^ set(expected)):
        presence = "present" if name in arrays else "absent"
        raise InputError(path, name, presence, "these are the arrays of something else")
    for name, array in arrays.items():
        kind = f"{array.dtype} {list(array.shape)}"
        wanted = f"{expected[name].dtype} {list(expected[name].shape)}"
        if kind != wanted:
            raise InputError(path, name, kind, f"expected {wanted}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(path, name, "not finite", "damaged; use another checkpoint")


def _sibling(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}"


def _replace(folder: Path, fresh: Path) -> None:
    old = _sibling(folder, "old")
    if folder.exists():
        folder.replace(old)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Bring back the checkpoint of a process that died between the two renames of `_replace`."""
    old = _sibling(folder, "old")
    if old.exists() and not folder.exists():
        old.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
