"""What engines say of themselves: vLLM's /metrics, and load reports in response headers (ORCA)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import NamedTuple

ORCA_REQUEST, ORCA_RESPONSE = "endpoint-load-metrics-format", "endpoint-load-metrics"
MOST = 1e15  # tokens since an engine's start, too

_LINE = re.compile(  # it begins with text, which is found six times as fast as a line's beginning
    r"\nvllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|num_preemptions_total"
    r"|inter_token_latency_seconds_(?:sum|count)|cache_config_info)(?:\{(.*)\})? (\S+)"
)
_LABEL = re.compile(r'(?:^|,)(num_gpu_blocks|block_size)="(\d{1,9})"')


class Reading(NamedTuple):
    """One scrape.

    Attributes:
        running, waiting, preemptions: requests, the last since the engine's start. kv_usage: in [0, 1].
        blocks, block_tokens: size of the KV cache; 0 where it is not told.
        decoded, decoding_s: output tokens but the first ones since the engine's start, and the time that they
            took, request by request; 0 where it is not told.
    """

    running: float
    waiting: float
    kv_usage: float
    preemptions: float
    blocks: int = 0
    block_tokens: int = 0
    decoded: float = 0.0
    decoding_s: float = 0.0


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
            told = dict(_LABEL.findall(labels))
            blocks += int(told.get("num_gpu_blocks", 0))
            block_tokens = int(told.get("block_size", 0))
        else:
            values[name].append(_number(name, number))
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if not values[name]:
            raise ValueError(f"{name} is missing")
    usage = values["kv_cache_usage_perc"]
    return Reading(
        running=sum(values["num_requests_running"]),
        waiting=sum(values["num_requests_waiting"]),
        kv_usage=min(sum(usage) / len(usage), 1.0),
        preemptions=sum(values["num_preemptions_total"]),
        blocks=blocks,
        block_tokens=block_tokens,
        decoded=sum(values["inter_token_latency_seconds_count"]),
        decoding_s=sum(values["inter_token_latency_seconds_sum"]),
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


def _number(name: str, text: str | float) -> float:
    value = float(text)
    if not 0 <= value <= MOST:
        raise ValueError(f"{name} is {text}")
    return value
