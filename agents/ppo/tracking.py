"""Weights & Biases, behind stable-baselines3's logger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter

from servegym.errors import InputError


class WandbWriter(KVWriter):
    """Sends every logged number to a run; offline, into `log_dir`, where no account is configured.

    Raises:
        InputError: when wandb is not installed.
    """

    def __init__(self, project: str, log_dir: str | Path | None, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("command line", "track", project, "pip install 'servegym[track]'") from error
        online = wandb.api.api_key is not None
        mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
        self._run = wandb.init(project=project, dir=log_dir, config=config, mode=mode)  # type: ignore[arg-type]

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        """Send one row of numbers."""
        self._run.log({k: v for k, v in key_values.items() if isinstance(v, np.ScalarType)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()
