"""An episode: what one lane plays from reset to end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.envs.cluster.spec import ClusterSpec
from servegym.envs.workloads.workload import Workload


@dataclass(frozen=True)
class Episode:
    """A workload on a fleet.

    Attributes:
        workload: the requests.
        cluster: the fleet.
        predicted_output: int32 [N], output tokens as a length predictor sees them, at least 1.
    """

    workload: Workload
    cluster: ClusterSpec
    predicted_output: np.ndarray
