"""Trained agents from disk."""

from __future__ import annotations

from pathlib import Path

from servegym.agents.policy import Policy
from servegym.errors import InputError
from servegym.runtime.bundle import is_bundle, load_bundle


def load_agent(path: str) -> Policy:
    """A bundle or a checkpoint as a policy.

    Raises:
        InputError: when the folder holds neither, or what it holds is damaged.
    """
    folder = Path(path)
    if is_bundle(folder):
        return load_bundle(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            folder, "trained_agent", path, "there is no checkpoint (config.json) or bundle (manifest.json)"
        )
    from servegym.agents.ppo import load_policy  # late: bundles need no torch

    return load_policy(folder)
