"""A dispatch rule that is linear in what an instance looks like, with weights that depend on the request.

    argmin_i  sum_f sum_c W[f, c] context_c feature_f(i)

The features are those that published rules are made of (loads, queues, memory, speed, cache hits), on scales
on which their products become sums: `lmetric` is W = 1 at `prefill` and `inflight`. The contexts let a
request be sent elsewhere for its priority, its length, or because the fleet is overloaded, which no published
rule does: so an evolved rule can keep classes apart, or give up part of a fleet to keep the rest within its
service levels. Everything comes from the observation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from servegym.agents.heuristics import make_heuristic
from servegym.agents.heuristics._rule import Rule, View
from servegym.agents.heuristics.composite import Composite
from servegym.errors import InputError
from servegym.files import write_json

FEATURES = (
    "prefill",  # log(1 + uncached tokens in flight and of this prompt / 64)
    "inflight",  # log(1 + requests in flight)
    "ttft",  # log(1 + t), t = predicted time to first token / its service level
    "late",  # t beyond 1, at most 3
    "near",  # t beyond 1/2, at most 1/2
    "step",  # s = decode step with this request / its service level
    "slow",  # s beyond 0.8, at most 2
    "kv",  # KV in flight and of this request, predicted output included / capacity, at most 3
    "full",  # the same beyond 0.9, at most 2
    "waiting",  # log(1 + requests waiting), as scraped
    "kv_usage",  # as scraped
    "running",  # log(1 + requests running), as scraped
    "free",  # log(free share of KV), as scraped
    "urgent",  # log(1 + requests in flight above the lowest priority)
    "others",  # log(1 + the rest of those in flight)
    "prefill_speed",  # log(tokens/s / 16,384)
    "decode_speed",  # log(tokens/s / 2,048)
    "work",  # log(1 + seconds to decode what is predicted in flight and for this request)
    "hit",  # share of the prompt that is cached there
    "session",  # 1 where the session's previous turn ran
    "idle",  # 1 without requests in flight
)
CONTEXTS = (
    "always",  # 1
    "priority",  # 1 below the highest priority
    "prompt",  # log(prompt tokens / 1,000) / 2
    "overload",  # queues / service level of the time to first token, at most 3 each, mean over the fleet
    "output",  # log(predicted output tokens / 200) / 2
)
SHAPE = len(FEATURES), len(CONTEXTS)


class EvolvedDispatch(Rule):
    """The instance of least cost under given weights.

    Args:
        weights: [F, C], or [B, F, C] for other weights in each lane.
    """

    name: ClassVar[str] = "evolved"

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = np.asarray(weights, np.float64)

    def cost(self, view: View) -> np.ndarray:
        """Weighted sum of the features, [B, I]."""
        weights = self.weights @ _contexts(view)[:, :, None]
        return (_features(view) @ weights)[:, :, 0]


def lmetric_weights() -> np.ndarray:
    """Weights with which the rule is `lmetric`, up to the scale of its tokens; float64 [F, C]."""
    weights = np.zeros(SHAPE)
    for name in ("prefill", "inflight"):
        weights[FEATURES.index(name), 0] = 1.0
    return weights


def _features(view: View) -> np.ndarray:
    """float64 [B, I, F]."""
    prompt, hit = view.request("prompt_tokens"), view.edge("prefix_hit_tokens")
    inflight, urgent = view.instance("inflight"), view.instance("urgent_inflight")
    ttft = (view.edge("queue_s") + view.edge("prefill_s")) / _at_least(view.request("slo_ttft_s"), 1e-3)
    step = view.edge("step_after_s") / _at_least(view.request("slo_tpot_s"), 1e-3)
    kv, usage = view.edge("kv_after"), view.instance("kv_usage")
    decode_speed = _at_least(view.instance("decode_tokens_per_s"), 1.0)
    predicted = view.instance("inflight_predicted_tokens") + view.request("predicted_output_tokens")
    columns = {
        "prefill": np.log1p((view.instance("inflight_prefill_tokens") + _at_least(prompt - hit, 0.0)) / 64.0),
        "inflight": np.log1p(inflight),
        "ttft": np.log1p(ttft),
        "late": np.clip(ttft - 1.0, 0.0, 3.0),
        "near": np.clip(ttft - 0.5, 0.0, 0.5),
        "step": step,
        "slow": np.clip(step - 0.8, 0.0, 2.0),
        "kv": np.minimum(kv, 3.0),
        "full": np.clip(kv - 0.9, 0.0, 2.0),
        "waiting": np.log1p(view.instance("waiting")),
        "kv_usage": usage,
        "running": np.log1p(view.instance("running")),
        "free": np.log(_at_least(1.0 - usage, 0.01)),
        "urgent": np.log1p(urgent),
        "others": np.log1p(_at_least(inflight - urgent, 0.0)),
        "prefill_speed": np.log(_at_least(view.instance("prefill_tokens_per_s"), 1.0) / 16384.0),
        "decode_speed": np.log(decode_speed / 2048.0),
        "work": np.log1p(predicted / decode_speed),
        "hit": view.hit_fraction(),
        "session": view.edge("session_last"),
        "idle": inflight == 0.0,
    }
    return np.stack([columns[name] for name in FEATURES], -1)


def _contexts(view: View) -> np.ndarray:
    """float64 [B, C]."""
    queue = np.clip(view.edge("queue_s") / _at_least(view.request("slo_ttft_s"), 1e-3), 0.0, 3.0)
    columns = {
        "always": np.ones((len(queue), 1)),
        "priority": np.minimum(view.request("priority"), 1.0),
        "prompt": np.log(_at_least(view.request("prompt_tokens"), 1.0) / 1000.0) / 2.0,
        "overload": queue.sum(1, keepdims=True) / _at_least(view.overall("instances"), 1.0),
        "output": np.log(_at_least(view.request("predicted_output_tokens"), 1.0) / 200.0) / 2.0,
    }
    return np.concatenate([columns[name] for name in CONTEXTS], 1)


def _at_least(values: np.ndarray, least: float) -> np.ndarray:
    return np.maximum(values, least)


# --- with rules for the other questions, and on disk --------------------------------------------------------


@dataclass(frozen=True)
class Evolved:
    """An evolved dispatch rule beside rules for the other questions.

    Attributes:
        scenario: name of what it was evolved for.
        system: heuristics joined by `+`; what they answer but dispatches is theirs.
        params: of these heuristics, in place of the published ones.
        weights: float64 [F, C].
        facts: how it was found.
    """

    scenario: str
    system: str
    params: dict[str, Any]
    weights: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def policy(self) -> Composite:
        """As a policy for all kinds of questions that the parts answer."""
        rules = other_rules(self.system, self.params)
        return Composite(f"evolved-{self.scenario}", dispatch=EvolvedDispatch(self.weights), **rules)


def other_rules(system: str, params: Mapping[str, Any]) -> dict[str, Rule]:
    """Kind -> the rule of a system for it, without its dispatch rule.

    Raises:
        InputError: for what `make_heuristic` refuses.
    """
    made = make_heuristic(system, **params)
    rules = made.rules if isinstance(made, Composite) else (made,)
    return {kind: rule for rule in rules for kind in rule.kinds if kind != "dispatch"}


def write_rule(path: Path, evolved: Evolved) -> None:
    """Write it as JSON, each weight by its names; weights of exactly 0 are left out."""
    weights: dict[str, dict[str, float]] = {}
    for f, c in zip(*np.nonzero(evolved.weights.round(4)), strict=True):
        weights.setdefault(FEATURES[f], {})[CONTEXTS[c]] = round(float(evolved.weights[f, c]), 4)
    about = {"scenario": evolved.scenario, "system": evolved.system, "params": evolved.params}
    write_json(path, about | {"weights": weights, "facts": evolved.facts})


def read_rule(path: Path) -> Evolved:
    """Read it back.

    Raises:
        InputError: for a file that is missing, damaged, or of other features.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        weights = np.zeros(SHAPE)
        for name, row in raw["weights"].items():
            for context, weight in row.items():
                weights[FEATURES.index(name), CONTEXTS.index(context)] = float(weight)
        evolved = Evolved(raw["scenario"], raw["system"], dict(raw["params"]), weights, dict(raw["facts"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "give a file that `servegym evolve` wrote"
        raise InputError(path, "evolved rule", repr(error), hint) from error
    if not np.isfinite(weights).all():
        raise InputError(path, "weights", "not finite", "give a file that `servegym evolve` wrote")
    evolved.policy()  # refuses an unknown system
    return evolved
