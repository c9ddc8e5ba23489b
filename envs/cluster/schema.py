"""The observation contract: every feature with its unit, its scaling and where a deployment reads it.

Arrays of one observation (a leading lane dimension in vectorised environments):

    instances   float32 [I, INSTANCE]    nodes: engine replicas, padded; see instance_mask
    requests    float32 [R, REQUEST]     nodes: requests that the decision is about, padded
    candidates  int32   [C, 3]           (request row, instance row, source row or -1) of each possible answer
    edges       float32 [C, EDGE]        features of the candidate
    globals     float32 [GLOBAL]
    history     float32 [HISTORY]        arrivals in each of the last HISTORY seconds, latest last
    instance_mask int8  [I]              1 where the row is an instance of this cluster
    mask        int8    [C]              1 where the answer is legal; candidate 0 always is
    kind        int64   []               index into KINDS

Candidate 0 is the default: what the stock system would do, or nothing. An agent that always answers 0 is
the system without an agent. The kinds of questions, and what the other candidates are:

    dispatch  a request has arrived: k >= 1 sends it to instance k - 1
    preempt   an instance lacks memory for its next tokens: 1 + 2 row recomputes that request later, 2 + 2 row
              swaps its KV to the host; candidate 0 is the engine's own victim
    migrate   a period has passed: each candidate is a pair of a source, shown by the request that would go,
              and a destination; candidate 0 moves nothing (more) this time
    move      a pair was chosen: 1 + row is the request of the source that goes; candidate 0 the default one
    budget    an instance prefills beside decodes: k >= 1 caps the prompt tokens of an iteration at the
              engine's token budget / 2^(k-1); candidate 0 keeps the cap
    scale     reserved

Networks read the first two columns of `candidates`; rules that compare source and destination the third.

Values are in natural units; a network scales them by each feature's `scale`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

VERSION = 2
KINDS = ("dispatch", "preempt", "migrate", "move", "budget", "scale")
OFFERS = 8  # most requests that a question is about
HISTORY = 16


@dataclass(frozen=True)
class Feature:
    """One observed number.

    Attributes:
        name, unit: the field's term and its unit.
        source: the metric or book-keeping by which a deployment knows it.
        scale: networks see log1p(x / scale) for `log` and x / scale for `linear` features.
        transform: which of the two.
    """

    name: str
    unit: str
    source: str
    scale: float = 1.0
    transform: Literal["log", "linear"] = "linear"


INSTANCE = (
    Feature("running", "requests", "vllm:num_requests_running, as last scraped", 4.0, "log"),
    Feature("waiting", "requests", "vllm:num_requests_waiting, as last scraped", 1.0, "log"),
    Feature("kv_usage", "fraction", "vllm:kv_cache_usage_perc, as last scraped"),
    Feature(
        "preemptions", "requests", "vllm:num_preemptions_total, rise between the last two scrapes", 1.0, "log"
    ),
    Feature("scrape_age", "s", "router's clock"),
    Feature("inflight", "requests", "router's book-keeping: sent and not finished", 4.0, "log"),
    Feature(
        "inflight_prefill_tokens",
        "tokens",
        "router: uncached part of prompts sent whose first token has not come",
        512.0,
        "log",
    ),
    Feature(
        "inflight_context_tokens", "tokens", "router: prompt and streamed tokens in flight", 4096.0, "log"
    ),
    Feature("inflight_predicted_tokens", "tokens", "router: predicted output still to come", 512.0, "log"),
    Feature("kv_capacity_tokens", "tokens", "vllm:cache_config_info blocks times block size", 65536.0, "log"),
    Feature("token_budget", "tokens", "engine argument max_num_batched_tokens", 2048.0, "log"),
    Feature("max_seqs", "requests", "engine argument max_num_seqs", 256.0, "log"),
    Feature("prefill_tokens_per_s", "tokens/s", "profile: one full chunk without past", 16384.0, "log"),
    Feature(
        "decode_tokens_per_s",
        "tokens/s",
        "profile: 64 requests (at most max_seqs) of 1,024 tokens decode",
        2048.0,
        "log",
    ),
    Feature("decode_step_s", "s", "profile at the requests and context in flight", 0.02, "log"),
    Feature("available", "0 or 1", "health check; 0 while failed, starting or draining"),
    Feature(
        "prefill_budget", "tokens", "router: most prompt tokens of an iteration, as last set", 2048.0, "log"
    ),
    Feature(
        "urgent_inflight", "requests", "router: in flight, above the workload's lowest priority", 4.0, "log"
    ),
    Feature("host_usage", "fraction", "engine: host memory that swapped KV takes"),
    Feature("engaged", "0 or 1", "router: source or destination of a migration in flight"),
)
REQUEST = (
    Feature("prompt_tokens", "tokens", "tokenised prompt", 512.0, "log"),
    Feature("predicted_output_tokens", "tokens", "length predictor with the scenario's error", 128.0, "log"),
    Feature("priority", "level", "request field; lower is more urgent"),
    Feature("slo_ttft_s", "s", "service level of the request's class", 1.0, "log"),
    Feature("slo_tpot_s", "s", "service level of the request's class", 0.05, "log"),
    Feature("weight", "1", "weight of the request's class"),
    Feature("waited_s", "s", "router's clock since arrival", 1.0, "log"),
    Feature("turn", "requests", "turns of the session before this one", 1.0, "log"),
    Feature("streamed_tokens", "tokens", "router: tokens streamed so far", 128.0, "log"),
    Feature(
        "predicted_left_tokens", "tokens", "router: predicted output less what was streamed", 128.0, "log"
    ),
    Feature("kv_tokens", "tokens", "engine: KV that the request holds on its instance", 512.0, "log"),
    Feature("running", "0 or 1", "engine: 1 while it runs, 0 while it waits or has just arrived"),
    Feature("preemptions", "requests", "engine: times it was preempted", 1.0, "log"),
    Feature("source_kv_usage", "fraction", "vllm:kv_cache_usage_perc of the instance where it is"),
    Feature("source_step_s", "s", "decode_step_s of the instance where it is", 0.02, "log"),
    Feature("source_queue_s", "s", "queue_s of the instance where it is", 0.5, "log"),
)
EDGE = (
    Feature("is_default", "0 or 1", "1 for candidate 0"),
    Feature("prefix_hit_tokens", "tokens", "KV events: leading prompt tokens cached there", 512.0, "log"),
    Feature("queue_s", "s", "profile: prefill of the prompts in flight there", 0.5, "log"),
    Feature("prefill_s", "s", "profile: prefill that the answer makes the instance compute", 0.5, "log"),
    Feature("step_after_s", "s", "profile: decode step there after the answer", 0.02, "log"),
    Feature("kv_after", "fraction", "context and predicted output in flight, with this request, by capacity"),
    Feature("session_last", "0 or 1", "router: the session's previous turn ran there"),
    Feature("swap", "0 or 1", "1 where the answer preempts by swap"),
    Feature(
        "copy_s",
        "s",
        "profile: copies that the answer starts, to the host and back or to the instance",
        0.1,
        "log",
    ),
    Feature(
        "prefill_cap", "tokens", "budget: most prompt tokens of an iteration after the answer", 2048.0, "log"
    ),
    Feature(
        "iteration_s",
        "s",
        "profile: iteration with the running decodes and that many prompt tokens",
        0.05,
        "log",
    ),
)
GLOBAL = (
    Feature("instances", "instances", "router's endpoint list", 8.0, "log"),
    Feature("arrival_rate", "requests/s", "router: exponential mean over 10 s", 8.0, "log"),
    Feature("arrival_prompt_tokens", "tokens/s", "router: exponential mean over 10 s", 8192.0, "log"),
    Feature("since_last_arrival_s", "s", "router's clock", 1.0, "log"),
    Feature("inflight", "requests", "router's book-keeping over all instances", 64.0, "log"),
)

HISTORY_FEATURE = Feature("arrivals", "requests", "router: arrivals in that second", 4.0, "log")


def most_candidates(instances: int, requests: int) -> int:
    """Candidates C of observations with so many instance rows, and one or `OFFERS` request rows."""
    return instances + 1 if requests == 1 else max(instances + 1, 1 + 2 * requests)


def describe() -> dict:
    """The whole contract as plain data; `schema_hash` covers exactly this."""
    tables = {"instances": INSTANCE, "requests": REQUEST, "edges": EDGE, "globals": GLOBAL}
    return {
        "version": VERSION,
        "kinds": list(KINDS),
        "offers": OFFERS,
        "history": HISTORY,
        "history_feature": asdict(HISTORY_FEATURE),
        **{name: [asdict(f) for f in features] for name, features in tables.items()},
    }


def schema_hash() -> str:
    """First 16 hex digits of the SHA-256 of the contract; a policy carries the one it was trained with."""
    return hashlib.sha256(json.dumps(describe(), sort_keys=True).encode()).hexdigest()[:16]


def column(features: tuple[Feature, ...], name: str) -> int:
    """Index of a feature by name.

    Raises:
        KeyError: for a name that is not in the table.
    """
    for index, feature in enumerate(features):
        if feature.name == name:
            return index
    raise KeyError(name)
