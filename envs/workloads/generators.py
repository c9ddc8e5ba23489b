"""Synthetic workloads by name: fitted to public traces, drawn from published laws, or constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from servegym.envs.workloads.checks import check_positive, check_whole
from servegym.envs.workloads.conversations import conversations
from servegym.envs.workloads.fits import fit
from servegym.envs.workloads.fitted import UNCLOCKED_RATE_RPS, fitted, fitted_rate_rps
from servegym.envs.workloads.flood import flood
from servegym.envs.workloads.parametric import fixed, llumnix
from servegym.envs.workloads.sessions import agent_sessions, chat_sessions
from servegym.envs.workloads.workload import Workload
from servegym.errors import InputError


@dataclass(frozen=True)
class Generator:
    """A named family of synthetic workloads.

    Attributes:
        name: what `generate` takes; with a form such as `:IN-OUT` after it where `form` says so.
        about: one line for people.
        source, license: where its numbers come from.
        rate_rps: rate used when none is given, requests/s.
        build: (whole name, requests, rate_rps, rng) -> Workload.
        form: how the part after the colon is written; empty where the name stands alone.
    """

    name: str
    about: str
    source: str
    license: str
    rate_rps: float
    build: Callable[[str, int, float, np.random.Generator], Workload]
    form: str = ""


def generate(name: str, requests: int, *, rate_rps: float | None = None, seed: int = 0) -> Workload:
    """Draw a synthetic workload.

    The same seed gives the same requests at every rate: a rate other than the fitted one compresses time,
    which keeps the burst structure. Session workloads differ in this: users and tools keep their pace, so a
    higher rate means more sessions at a time.

    Args:
        name: a name in GENERATORS, for example `azure2023_conv`, `llumnix:128-128` or `fixed:1024-256`.
        requests: number of rows, at least 1.
        rate_rps: base rate of the arrival process in requests/s; None takes the fitted one (1 for sources
            without clock time). A short window lies above or below it, as one of the trace would: use
            `scale_rate` for an exact mean.
        seed: seed of all draws.

    Raises:
        InputError: for a name that is not there (the error lists what is) or an impossible number.
    """
    generator = GENERATORS.get(name.split(":")[0])
    if generator is None:
        raise InputError("workload", "name", name, f"no such generator; there are {', '.join(GENERATORS)}")
    if generator.form == "" and ":" in name:
        raise InputError("workload", "name", name, f"{generator.name} takes nothing after its name")
    check_whole(name, "requests", requests, 1)
    check_whole(name, "seed", seed, 0)
    rate = generator.rate_rps if rate_rps is None else check_positive(name, "rate_rps", rate_rps)
    return generator.build(name, requests, rate, np.random.default_rng(seed))


def _from_fit(name: str, about: str, build: Callable[..., Workload] = fitted, form: str = "") -> Generator:
    f = fit(name)
    return Generator(name, about, f["source"], f["license"], fitted_rate_rps(name), build, form)


GENERATORS: dict[str, Generator] = {
    g.name: g
    for g in (
        _from_fit("azure2023_conv", "chat on Azure: bursty rate, medium prompts, the default"),
        _from_fit("azure2023_code", "code completion on Azure: ON/OFF batches, long prompts, short outputs"),
        _from_fit(
            "servegen_general", "general-purpose API, 17 clients: bursty, prompts and outputs correlated"
        ),
        _from_fit(
            "mooncake_conversation",
            "long-context chat: a third of the requests continues an earlier one",
            conversations,
        ),
        _from_fit("servegen_reason", "reasoning API: short prompts, long outputs"),
        _from_fit("arxiv_summarization", "summarisation of papers: long prompts, short outputs, Poisson"),
        _from_fit(
            "weka_agentic",
            "coding agents: closed-loop sessions with tool calls; prompts of at most MAX tokens",
            agent_sessions,
            "[:MAX]",
        ),
        _from_fit("sharegpt_turns", "ShareGPT conversations: closed-loop sessions", chat_sessions),
        Generator(
            "llumnix",
            "power-law lengths of a mean of 128, 256, 512 or 1024; Poisson or gamma arrivals",
            "alibaba/llm-scheduling-artifact; Llumnix, OSDI 2024",
            "law re-implemented from the paper's artifact",
            UNCLOCKED_RATE_RPS,
            llumnix,
            ":IN-OUT[:cvX]",
        ),
        Generator(
            "flood",
            "fitted traffic of 16 tenants, and for a fifth of the time one more that sends TIMES as much",
            "ServeGym, on the fits named",
            "MIT, and those of the fits",
            UNCLOCKED_RATE_RPS,
            flood,
            ":STEADY+FLOOD:xTIMES",
        ),
        Generator(
            "fixed",
            "constant lengths, Poisson arrivals",
            "ServeGym",
            "MIT",
            UNCLOCKED_RATE_RPS,
            fixed,
            ":IN-OUT",
        ),
    )
}
