"""The state that a resumed run needs beside the network: out of the trainer, and into it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from servegym.agents.ppo.checkpoint import ENV, OPTIMIZER, TRAINER, check_arrays, read_arrays, read_info
from servegym.errors import InputError

if TYPE_CHECKING:
    from servegym.agents.ppo.ppo import PPO

_ADAM = ("step", "exp_avg", "exp_avg_sq")


def optimizer_state(model: PPO) -> dict[str, np.ndarray]:
    """Adam's moments and step count for each parameter, zeros before the first update."""
    arrays = {}
    for name, parameter in model.network.named_parameters():
        state = model.optimizer.state.get(parameter, {})
        blank = {"step": torch.zeros(())}
        for key in _ADAM:
            value = state.get(key, blank.get(key, torch.zeros_like(parameter)))
            arrays[f"{name}.{key}"] = value.detach().cpu().numpy()
    return arrays


def trainer_state(model: PPO) -> dict[str, np.ndarray]:
    """Random state, normaliser, and counters."""
    return {
        "generator": model.generator.get_state().numpy(),
        "normalizer": model.normalizer.state(),
        **model.tally._asdict(),
        "updates": np.array([model._n_updates]),
    }


def load_state(model: PPO, folder: Path) -> None:
    """Put a checkpoint's optimizer, trainer and environment state into a fresh trainer.

    Raises:
        InputError: where one of them is missing, changed, or does not fit the trainer's environment.
    """
    for name in (OPTIMIZER, TRAINER, ENV):
        if not (folder / name).is_file():
            raise InputError(folder, name, "absent", "this checkpoint plays but cannot be resumed")
    info = read_info(folder)
    moments = read_arrays(folder / OPTIMIZER, info)
    check_arrays(folder / OPTIMIZER, moments, optimizer_state(model))
    for name, parameter in model.network.named_parameters():
        state = {key: torch.from_numpy(moments[f"{name}.{key}"]) for key in _ADAM}
        model.optimizer.state[parameter] = {
            k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
        }

    arrays = read_arrays(folder / TRAINER, info)
    check_arrays(folder / TRAINER, arrays, trainer_state(model))
    model.generator.set_state(torch.from_numpy(arrays["generator"]))
    model.normalizer.load(arrays["normalizer"])
    for name, array in model.tally._asdict().items():
        array[:] = arrays[name]
    model._n_updates = int(arrays["updates"][0])
    model.vector_env.load_state(read_arrays(folder / ENV, info))
    model.look()
