"""The runtimes on which policies are played in real time, by name."""

from __future__ import annotations

from pathlib import Path

from servegym.envs.cluster.spec import ClusterSpec
from servegym.envs.costs.profile import load_profile, profile_path
from servegym.errors import InputError
from servegym.runtime.validate import Player

RUNTIMES = ("torch", "vllm")
_DTYPES = {2: "bfloat16", 4: "float32"}


def open_player(runtime: str, fleet: ClusterSpec, device: str) -> Player:
    """Engines for a fleet.

    Args:
        runtime: one of `RUNTIMES`.
        fleet: instances whose profiles were calibrated on that runtime.
        device: cpu or cuda, of the torch runtime.

    Raises:
        InputError: an unknown runtime or device, or a profile that does not belong to its model.
    """
    if runtime == "torch":
        return _torch(fleet, device)
    if runtime == "vllm":
        from servegym.runtime.vllm.player import open_player as open_vllm

        return open_vllm(fleet)
    raise InputError("validate", "runtime", runtime, f"choose one of {', '.join(RUNTIMES)}")


def _torch(fleet: ClusterSpec, device: str) -> Player:
    """Random weights for the config.json beside each profile, in the number format that was calibrated."""
    from servegym.runtime.calibrate.machine import check_device
    from servegym.runtime.engine.cluster import EnginePlayer
    from servegym.runtime.engine.config import load_config
    from servegym.runtime.engine.model import Transformer, geometry

    check_device(device)
    models = {}
    for name in dict.fromkeys(spec.profile for spec in fleet.instances):
        profile, config_path = load_profile(name), _beside(profile_path(name), "config.json")
        config = load_config(config_path)
        found = geometry(config, profile.model.bytes_per_value)
        for field, value in vars(found).items():
            if field != "name" and value != getattr(profile.model, field):
                hint = f"{name} was measured with another model: {getattr(profile.model, field)}"
                raise InputError(config_path, field, value, hint)
        dtype = _DTYPES.get(profile.model.bytes_per_value)
        if dtype is None:
            known = " or ".join(map(str, _DTYPES))
            raise InputError(name, "model.bytes_per_value", profile.model.bytes_per_value, f"must be {known}")
        models[name] = Transformer(config, device, dtype)
    return EnginePlayer(models)


def _beside(profile: Path, name: str) -> Path:
    """A file that `servegym calibrate` writes beside a profile."""
    path = profile.with_name(name)
    if not path.is_file():
        raise InputError(path, "file", name, "missing; `servegym calibrate` writes it beside profile.json")
    return path
