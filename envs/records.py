"""Records: what became of each request, the same from the cluster model and from a real runtime."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Records:
    """One row a request; all arrays have N rows. Times are float64 seconds; NaN where it never happened.

    Attributes:
        arrived_s, dispatched_s, first_token_s, finished_s: when it reached the router, was given to an
            instance, streamed its first token, streamed its last.
        max_gap_s: longest time between two of its tokens; 0 for one-token answers.
        prompt_tokens, output_tokens, cached_tokens: int32; cached are prompt tokens found in the prefix cache
            at first admission.
        lost_tokens: int64, tokens whose KV was computed and thrown away by preemption.
        preemptions, migrations: int32 counts.
        instance: int32, where it finished; -1 before dispatch.
        class_id, priority: int16, as in the workload.
    """

    arrived_s: np.ndarray
    dispatched_s: np.ndarray
    first_token_s: np.ndarray
    finished_s: np.ndarray
    max_gap_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    cached_tokens: np.ndarray
    lost_tokens: np.ndarray
    preemptions: np.ndarray
    migrations: np.ndarray
    instance: np.ndarray
    class_id: np.ndarray
    priority: np.ndarray

    def __len__(self) -> int:
        return len(self.arrived_s)

    @property
    def ttft_s(self) -> np.ndarray:
        """Time to first token, float64 [N]."""
        return self.first_token_s - self.arrived_s

    @property
    def e2e_s(self) -> np.ndarray:
        """Arrival to last token, float64 [N]."""
        return self.finished_s - self.arrived_s

    @property
    def tpot_s(self) -> np.ndarray:
        """Mean time per output token after the first, float64 [N].

        0 for one-token answers, as in vLLM's benchmark.
        """
        return (self.finished_s - self.first_token_s) / np.maximum(self.output_tokens - 1, 1)
