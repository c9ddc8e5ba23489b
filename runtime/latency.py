"""The latency that a request would meet on an engine, from a few counters of it and a calibrated profile.

Known are, as llm-d's router knows them, the engine's running and waiting requests n and w, its share of used
KV, the tokens Q of prompts sent to it whose first token has not come, and the request's prompt of L tokens,
a part of which is cached. With B the token budget and room = B - n the prompt tokens of an iteration,

    iteration(c)  an iteration of n decodes at the mean context and c prompt tokens, from the cost model
    TTFT = max(iteration in progress / 2 + (Q / room) iteration(room), departures) + own prefill
    own prefill = iteration(own) for own <= room, else (own / room) iteration(room); own = L - cached
    departures = step * (mean output / n) * leaving
    leaving    = requests that have to end until the KV and a seat for all who wait and for this one are free
    TPOT = (1 - f) step + f iteration(c); f is the share of iterations with a prompt in them

`step` is iteration(0) once all who wait and this one decode. In a steady state each of the n requests ends,
and another prompt arrives, once in (mean output) steps; so f = n prompt / (mean output * c) with
c = min(prompt, room), where a prompt is what contexts hold beyond half the mean output.

Assumptions: the waiting prompts are like this one where Q is not known (0); contexts are alike; a running
request is in the midst of its output; arrivals replace who leaves; waiting requests are served in order of
arrival; what is cached stays cached; no preemptions. Far beyond saturation, where all of the KV is held and
sessions share prefixes, TTFT comes out too low.
"""

from __future__ import annotations

from dataclasses import dataclass

from servegym.envs.cluster.state import PS
from servegym.envs.costs.profile import Profile
from servegym.envs.costs.reference import ReferenceCosts
from servegym.envs.costs.tables import cost_tables

MEAN_OUTPUT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Situation:
    """A request at the door of an engine.

    Attributes:
        kv_usage: share of the KV cache in use, 0 to 1.
        running, waiting: requests in the engine.
        queued_tokens: prompt tokens sent to it whose first output token has not come; 0: not known.
        prompt_tokens: of the request, at least 1.
        cached_share: share of them that the engine has cached, 0 to 1.
    """

    kv_usage: float
    running: int
    waiting: int
    queued_tokens: int
    prompt_tokens: int
    cached_share: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds to the first token, and for each token after it."""

    ttft_s: float
    tpot_s: float


class LatencyModel:
    """Predicts latencies on engines of one profile.

    Args:
        profile: what iterations cost, and the engine's limits.
        mean_output_tokens: of the traffic, at least 1.
    """

    def __init__(self, profile: Profile, mean_output_tokens: float = MEAN_OUTPUT_TOKENS) -> None:
        self.profile, self.mean_output = profile, mean_output_tokens
        self._costs = ReferenceCosts(cost_tables([profile], profile.token_budget, profile.max_seqs + 1))

    def predict(self, at: Situation) -> Latency:
        """TTFT and TPOT of a request that is sent there now."""
        load = _Load.of(at, self.profile)
        step = self._iteration(load.decoding, load.context_then, 0, 0)
        wait = max(self._work_ahead(load), self._departures(load, step))
        return Latency(wait + self._own_prefill(load), self._mean_step(load, step))

    def _work_ahead(self, load: _Load) -> float:
        """Seconds until the iteration in progress and the prompts that came before are done."""
        room, queued = load.room, load.queued
        now = self._iteration(load.running, load.context, min(queued, room), 0)
        behind = max(queued - room, 0) / room
        return now / 2 + (behind * self._iteration(load.running, load.context, room, 0) if behind else 0.0)

    def _departures(self, load: _Load, step: float) -> float:
        """Seconds until so many have ended that there are a seat and KV for the request."""
        if not load.leaving or not load.running:
            return 0.0
        return load.leaving * step * self.mean_output / load.running

    def _own_prefill(self, load: _Load) -> float:
        piece = min(load.own, load.room)
        past = load.cached + (load.own - piece) // 2
        return load.own / piece * self._iteration(load.running, load.context, piece, past)

    def _mean_step(self, load: _Load, step: float) -> float:
        """Seconds an output token, with its share of the prompts that arrive meanwhile."""
        prompt = max(load.context - self.mean_output / 2, 1.0) if load.running else load.own + load.cached
        fresh = max(round(prompt * load.own / (load.own + load.cached)), 1)
        chunk = min(fresh, load.room)
        share = min(load.decoding * fresh / (self.mean_output * chunk), 1.0)
        return (1 - share) * step + share * self._iteration(load.decoding, load.context_then, chunk, 0)

    def _iteration(self, decodes: int, context: int, chunk: int, past: int) -> float:
        """Seconds of an iteration of so many decodes and one chunk; 0 for an idle engine."""
        chunk = min(chunk, self.profile.token_budget - decodes)
        if not decodes and chunk < 1:
            return 0.0
        return self._costs.iteration_ps(0, [context] * decodes, [(chunk, past)] if chunk > 0 else []) / PS


@dataclass(frozen=True, slots=True)
class _Load:
    """What a situation means for an engine: requests and tokens.

    Attributes:
        running, context: decodes now, and their mean context.
        decoding, context_then: the same once those who wait and the request have joined, as far as they fit.
        queued: prompt tokens ahead. room: prompt tokens of an iteration.
        own, cached: tokens of the request's prompt to compute, and those that are there.
        leaving: requests that have to end before the request gets in.
    """

    running: int
    context: int
    decoding: int
    context_then: int
    queued: int
    room: int
    own: int
    cached: int
    leaving: float

    @classmethod
    def of(cls, at: Situation, profile: Profile) -> _Load:
        seats, memory = profile.max_seqs, profile.kv_tokens
        running, used = min(at.running, seats), round(at.kv_usage * memory)
        context = used // running if running else 0
        queued = at.queued_tokens or at.waiting * at.prompt_tokens
        cached = min(int(at.cached_share * at.prompt_tokens), at.prompt_tokens - 1)
        everyone, wanted = running + at.waiting + 1, used + queued + at.prompt_tokens
        decoding = max(min(everyone, seats, everyone * memory // wanted), 1)
        short = (wanted - memory) / context if context else 0.0
        return cls(
            running=running,
            context=context,
            decoding=decoding,
            context_then=min(wanted, memory) // decoding,
            queued=queued,
            room=max(profile.token_budget - running, 1),
            own=at.prompt_tokens - cached,
            cached=cached,
            leaving=max(everyone - seats, short, 0.0),
        )
