"""`servegym gateway`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from servegym.runtime.gateway.settings import Settings


@dataclass(kw_only=True)
class Command(Settings):
    """Put a policy in front of a list of engines: an endpoint picker, and an Envoy that asks it.

    Clients talk to `http://HOST:PORT/v1/...` as to one engine. SIGHUP loads the bundle anew, as a change of
    its folder does, and looks up the engines again; SIGTERM lets requests in flight end first.
    """

    policy: tyro.conf.Positional[str]
    """Bundle folder, or a heuristic's name (see `servegym heuristics`)."""
    fallback: Annotated[str | None, tyro.conf.arg(name="fallback")] = None
    """Heuristic to play at a time-out, NaN or stale state; by default the one that the bundle names."""

    def run(self) -> int:
        """Serve until a signal or Envoy's end; returns 0 after a signal."""
        from servegym.runtime.gateway.serve import serve  # late: what it imports is an extra

        return serve(self, self.policy, self.fallback)
