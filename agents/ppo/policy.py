"""A trained network as a policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from servegym.agents.policy import Observation
from servegym.agents.ppo.checkpoint import read_network
from servegym.agents.task import Task
from servegym.envs.cluster.decisions import kinds_of
from servegym.errors import InputError
from servegym.models.dense import DenseNetwork
from servegym.models.features import ARRAYS, WIDTH


class NetworkPolicy:
    """Answers with the candidate that the network scores highest; the first of equals.

    Args:
        network: what scores.
        name: for tables.
        task: what it was trained for.

    Attributes:
        kinds: the questions that it answers.
    """

    needs_oracle = False

    def __init__(self, network: DenseNetwork, name: str = "network", task: Task | None = None) -> None:
        self.network = network.eval()
        self.name = name
        self.task = task or Task()
        self.kinds = kinds_of(self.task.decisions)

    def reset(self, lanes: int, seed: int) -> None:
        """Nothing to forget: the network has no memory and draws no random numbers.

        Sets torch to one thread: batches this small wait for a second one longer than they compute, and
        numba's OpenMP layer raises torch's number behind its back.
        """
        torch.set_num_threads(1)

    def act(self, obs: Observation) -> np.ndarray:
        """Answer one decision per lane; see `servegym.agents.policy.Policy`.

        Raises:
            InputError: for an observation of another contract, without a legal candidate, or with numbers
                that make a score infinite or undefined.
        """
        for name, width in WIDTH.items():
            if obs[name].shape[-1] != width:
                raise InputError(
                    "observation", name, obs[name].shape, f"expected a last dimension of {width}"
                )
        device = self.network.value_out.weight.device
        with torch.no_grad():
            logits, _ = self.network({name: torch.as_tensor(obs[name], device=device) for name in ARRAYS})
        scores = logits.cpu().numpy()
        actions = scores.argmax(1)
        bad = np.flatnonzero(
            ~np.isfinite(scores).all(1) | (obs["mask"][np.arange(len(scores)), actions] == 0)
        )
        if len(bad):
            raise InputError(
                "observation", f"lane {bad[0]}", "no finite legal score", "check its values and mask"
            )
        return actions


def load_policy(folder: str | Path) -> NetworkPolicy:
    """The policy of a checkpoint, named after its folder.

    Raises:
        InputError: for a checkpoint that is missing, damaged, or of another observation contract.
    """
    network, info = read_network(folder)
    return NetworkPolicy(network, Path(folder).resolve().name, info.task)
