"""What decides: a batch of observations in, a batch of answers out.

Heuristics, networks, search and exported bundles all are policies; environments, evaluation and the
runtime know nothing else of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Observation = Mapping[str, np.ndarray]


class Policy(Protocol):
    """A decision rule over batches of lanes."""

    @property
    def name(self) -> str:
        """The name that tables and flags use."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """The questions that it answers, of `servegym.envs.cluster.schema.KINDS`.

        Whoever plays it leaves other questions to built-in rules; those of these kinds that it has no opinion
        on it answers by 0.
        """
        ...

    @property
    def needs_oracle(self) -> bool:
        """True for rules that read `obs["oracle"]`, [B, C], what each answer truly costs.

        Seconds of work left on the instance of a dispatch, output tokens to come of a request that may give
        way or move. No deployment knows it; only evaluation asks the environment for it.
        """
        ...

    def reset(self, lanes: int, seed: int) -> None:
        """Forget everything and prepare for `lanes` parallel clusters."""

    def act(self, obs: Observation) -> np.ndarray:
        """Answer one question per lane.

        Args:
            obs: arrays of `servegym.envs.cluster.schema` with a leading lane dimension B.

        Returns:
            int64 [B], the index of a legal candidate for each lane.
        """
        ...
