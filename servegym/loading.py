"""Trained agents from disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from servegym.errors import InputError
from servegym.runtime.bundle import is_bundle, load_bundle

if TYPE_CHECKING:
    from servegym.agents.ppo import NetworkPolicy
    from servegym.runtime.bundle import BundlePolicy


def load_agent(path: str, env: str | None = None) -> NetworkPolicy | BundlePolicy:
    """A bundle or a checkpoint as a policy.

    Args:
        path: its folder.
        env: id of the environment that it must be for; None takes any.

    Raises:
        InputError: when the folder holds neither, what it holds is damaged, or is for another environment.
    """
    folder = Path(path)
    if is_bundle(folder):
        agent: NetworkPolicy | BundlePolicy = load_bundle(folder)
    elif (folder / "config.json").is_file():
        from servegym.agents.ppo import load_policy  # late: bundles need no torch

        agent = load_policy(folder)
    else:
        hint = "there is no checkpoint (config.json) or bundle (manifest.json)"
        raise InputError(folder, "trained_agent", path, hint)
    if env is not None and agent.task.env != env:
        hint = f"it takes {', '.join(agent.task.decisions)}; leave --env out, or choose another agent"
        raise InputError(folder, "env", agent.task.env, hint)
    return agent
