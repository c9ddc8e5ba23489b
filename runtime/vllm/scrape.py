"""What a vLLM server says of itself on /metrics."""

from __future__ import annotations

import re
from dataclasses import dataclass

from servegym.errors import InputError

_LINE = re.compile(r"^vllm:(\w+)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Reading:
    """One look at a server; counts are sums over its engines.

    Attributes:
        running, waiting: requests.
        kv_usage: fraction of the KV blocks in use.
        preemptions: since its start.
        kv_blocks, block_tokens: its KV cache; 0 where it does not say.
    """

    running: float
    waiting: float
    kv_usage: float
    preemptions: float
    kv_blocks: int = 0
    block_tokens: int = 0


def read_metrics(url: str, text: str) -> Reading:
    """Parse Prometheus text.

    Raises:
        InputError: a number is missing, or is none that such a metric can have.
    """
    sums: dict[str, float] = {}
    info: dict[str, str] = {}
    for name, labels, value in _LINE.findall(text):
        if name == "cache_config_info":
            info = dict(_LABEL.findall(labels))
        elif name in _WANTED:
            sums[name] = sums.get(name, 0.0) + _number(url, name, value)
    for name in _WANTED:
        if name not in sums:
            raise InputError(url, f"vllm:{name}", None, "is not in /metrics; is this a vLLM server?")
    return Reading(
        running=sums["num_requests_running"],
        waiting=sums["num_requests_waiting"],
        kv_usage=min(sums["kv_cache_usage_perc"], 1.0),
        preemptions=sums["num_preemptions_total"],
        kv_blocks=_count(info.get("num_gpu_blocks")),
        block_tokens=_count(info.get("block_size")),
    )


_WANTED = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")


def _number(url: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(url, f"vllm:{name}", text, "is no count")
    return value


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
