"""Which request of the source a migration of Llumnix takes.

Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", OSDI'24, and its
artifact, alibaba/llm-scheduling-artifact.

    paper:     the lowest priority, then the shortest: least KV to copy
    artifact:  the request at normal priority that was admitted last and decodes, which is the default
"""

from __future__ import annotations

from typing import ClassVar

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import choice
from servegym.envs.cluster.rule_names import MODES


class MoveLlumnix(BuiltIn):
    """The least urgent and shortest request, or the one admitted last.

    Args:
        mode: "paper" or "artifact".
    """

    name = "move_llumnix"
    kinds = ("move",)
    search_space: ClassVar[dict[str, tuple]] = {"mode": MODES}

    def __init__(self, mode: str = "paper") -> None:
        self.mode = choice(self.name, "mode", mode, MODES)
        self.rule = "shortest" if mode == "paper" else "default"
