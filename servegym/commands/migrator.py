"""`servegym migrator`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from servegym.runtime.vllm.serve import Settings, serve


@dataclass(kw_only=True)
class Command(Settings):
    """Serve OpenAI completions from several vLLM servers; requests move between them as a policy decides.

    A greedy answer is the same, token for token, however often it moves, and outlives its server.
    """

    policy: tyro.conf.Positional[str]
    """Bundle folder, or a heuristic's name such as lmetric+llumnix (see `servegym heuristics`)."""
    fallback: Annotated[str | None, tyro.conf.arg(name="fallback")] = None
    """Heuristic for dispatches at a time-out, NaN or stale state; by default the bundle's."""

    def run(self) -> int:
        """Serve until a signal."""
        return serve(self, self.policy, self.fallback)
