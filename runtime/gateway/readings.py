"""What engines say of themselves: vLLM's /metrics, and load reports in response headers (ORCA)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple

ORCA_REQUEST, ORCA_RESPONSE = "endpoint-load-metrics-format", "endpoint-load-metrics"
MOST = 1e9
MOST_SINCE_START = 1e15  # tokens

_NEEDED = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
# What need not be there, nor be true: an engine's pace.
_PACE = ("time_to_first_token_seconds_count", "generation_tokens_total", "inter_token_latency_seconds_sum")
_NAMES = "|".join((*_NEEDED, *_PACE, "num_preemptions_total", "cache_config_info"))
# It begins with text, which is found six times as fast as a line's beginning.
_LINE = re.compile(rf"\nvllm:({_NAMES})(?:\{{(.*)\}})? (\S+)")
_LABEL = re.compile(r'(?:^|,)(num_gpu_blocks|block_size)="(\d{1,9})"')


class Reading(NamedTuple):
    """One scrape.

    Attributes:
        running, waiting, preemptions: requests, the last since the engine's start. kv_usage: in [0, 1].
        blocks, block_tokens: size of the KV cache; 0 where it is not told.
        begun, generated, decoding_s: since the engine's start, requests whose first token came, output
            tokens, and the time that those behind first ones took, request by request; 0 where not told.
    """

    running: float
    waiting: float
    kv_usage: float
    preemptions: float
    blocks: int = 0
    block_tokens: int = 0
    begun: float = 0.0
    generated: float = 0.0
    decoding_s: float = 0.0

    @property
    def decoded(self) -> float:
        """Output tokens behind first ones; not the count of latencies, for several may come at once."""
        return self.generated - self.begun


class Load(NamedTuple):
    """What a response header says; None where it does not."""

    waiting: float | None = None
    kv_usage: float | None = None


def parse_metrics(text: str) -> Reading:
    """Read Prometheus text; counts of several engines behind one address add up, their usage is the mean.

    Raises:
        ValueError: a metric is missing, or no number that it can be.
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    blocks = block_tokens = 0
    for name, labels, number in _LINE.findall("\n" + text):
        if name == "cache_config_info":
            size = dict(_LABEL.findall(labels))
            blocks += int(size.get("num_gpu_blocks", 0))
            block_tokens = int(size.get("block_size", 0))
        elif name in _PACE:
            with suppress(ValueError):
                values[name].append(_number(name, number, MOST_SINCE_START))
        else:
            values[name].append(_number(name, number))
    for name in _NEEDED:
        if not values[name]:
            raise ValueError(f"{name} is missing")
    usage = values["kv_cache_usage_perc"]
    told = all(values[name] for name in _PACE)
    begun, generated, decoding_s = (sum(values[name]) if told else 0.0 for name in _PACE)
    return Reading(
        running=sum(values["num_requests_running"]),
        waiting=sum(values["num_requests_waiting"]),
        kv_usage=min(sum(usage) / len(usage), 1.0),
        preemptions=sum(values["num_preemptions_total"]),
        blocks=blocks,
        block_tokens=block_tokens,
        begun=begun,
        generated=generated,
        decoding_s=decoding_s,
    )


def parse_load(header: str) -> Load:
    """Read an ORCA header, `JSON {...}` or `TEXT named_metrics.x=0.4, ...`; the unreadable is not told."""
    form, _, report = header.partition(" ")
    try:
        if form == "JSON":
            named = json.loads(report)["named_metrics"]
        else:
            pairs = (part.strip().partition("=") for part in report.split(","))
            named = {key.removeprefix("named_metrics."): value for key, _, value in pairs}
        waiting, usage = named.get("num_requests_waiting"), named.get("kv_cache_usage_perc")
        return Load(
            None if waiting is None else _number("waiting", waiting),
            None if usage is None else min(_number("usage", usage), 1.0),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Load()


def _number(name: str, text: str | float, most: float = MOST) -> float:
    value = float(text)
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {text}")
    return value
