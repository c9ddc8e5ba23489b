"""Checkpoints while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stable_baselines3.common.callbacks import BaseCallback

if TYPE_CHECKING:
    from servegym.agents.ppo.ppo import PPO

MOST_SHARE = 0.05  # of the time; the state of many lanes with large prefix caches takes gigabytes


class CheckpointCallback(BaseCallback):
    """Saves between updates, and once more when training ends or is interrupted.

    Where saving takes long it is done less often, so that it costs at most a twentieth of the time.

    Args:
        folder: of the checkpoint, which each save replaces.
        every: decisions between two saves, at least.
        extra: makes further text files by name for each save, for example the model card.
    """

    def __init__(
        self, folder: str | Path, every: int, extra: Callable[[PPO], Mapping[str, str]] | None = None
    ) -> None:
        super().__init__()
        self.folder, self.every, self.extra = Path(folder), every, extra
        self._saved_at = 0
        self._not_before = 0.0

    def _on_training_start(self) -> None:
        self._saved_at = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        is_due = self.model.num_timesteps - self._saved_at >= self.every
        if is_due and time.monotonic() >= self._not_before:
            self._save()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        model, start = cast("PPO", self.model), time.monotonic()
        model.save(self.folder, self.extra(model) if self.extra else None)
        self._saved_at = model.num_timesteps
        end = time.monotonic()
        self._not_before = end + (end - start) * (1.0 / MOST_SHARE - 1.0)
