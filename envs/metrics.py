"""Metrics: records -> numbers, the same for the cluster model and for real engines.

Definitions follow vLLM's serving benchmark (`vllm bench serve`): percentiles interpolate linearly, requests
that never produced the event are left out of its percentiles, one-token answers have no TPOT, and rates
divide by the span from the first arrival to the last finish. Goodput is DistServe's: requests that meet
both TTFT and TPOT of their class. A request that did not finish is a miss, never left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from servegym.envs.records import Records
from servegym.envs.scenario import Slo


@dataclass(frozen=True)
class Metric:
    """One column of a results table.

    Attributes:
        name: key of the dict that `summarize` returns.
        unit: its unit.
        better: +1 where more is better, -1 where less is, 0 where neither.
        doc: what it is, for the README and for `servegym evaluate --help`.
    """

    name: str
    unit: str
    better: int
    doc: str


def _latency(name: str, what: str) -> tuple[Metric, ...]:
    statistics = (("mean", "mean"), ("p50", "median"), ("p99", "99th percentile"))
    return tuple(Metric(f"{name}_{key}_s", "s", -1, f"{what}, {text}") for key, text in statistics)


METRICS = (
    Metric("requests", "requests", 0, "requests that arrived"),
    Metric(
        "unfinished",
        "requests",
        -1,
        "requests without a last token when the episode ended; each is an SLO miss",
    ),
    *_latency("ttft", "arrival to first token"),
    *_latency("tpot", "time per output token after the first, of requests with more than one"),
    *_latency("e2e", "arrival to last token"),
    Metric("max_gap_p99_s", "s", -1, "99th percentile over requests of the longest wait between two tokens"),
    Metric("goodput", "fraction", +1, "requests that met TTFT and TPOT of their class, weighted by class"),
    Metric(
        "goodput_rps",
        "requests/s",
        +1,
        "requests that met both, each counted once whatever its class, "
        "by the span from first arrival to last finish",
    ),
    Metric("throughput_rps", "requests/s", +1, "finished requests by the same span"),
    Metric("throughput_tokens_per_s", "tokens/s", +1, "output tokens of finished requests by the same span"),
    Metric("preemptions", "per request", -1, "preemptions by requests"),
    Metric("lost_tokens", "tokens/request", -1, "tokens computed and thrown away by preemption, by requests"),
    Metric("cache_hits", "fraction", +1, "prompt tokens found in a prefix cache at first admission"),
)


def met_slo(records: Records, slo: Sequence[Slo]) -> np.ndarray:
    """Which requests finished within TTFT and TPOT of their class; bool [N].

    Args:
        records: what happened.
        slo: service level of each class id.
    """
    ttft, tpot = (np.array([getattr(s, f) for s in slo])[records.class_id] for f in ("ttft_s", "tpot_s"))
    with np.errstate(invalid="ignore"):
        return np.isfinite(records.finished_s) & (records.ttft_s <= ttft) & (records.tpot_s <= tpot)


def class_slos(class_names: Sequence[str], slo: Slo, class_slo: Mapping[str, Slo]) -> list[Slo]:
    """Service level by class id, from a scenario's `slo` and `class_slo`."""
    return [class_slo.get(name, slo) for name in class_names]


def summarize(records: Records, slo: Sequence[Slo]) -> dict[str, float]:
    """Every metric of `METRICS` for one episode; NaN where nothing happened that it could measure.

    Args:
        records: one episode or one run.
        slo: service level of each class id, see `class_slos`.
    """
    finished = np.isfinite(records.finished_s)
    span = max(_span(records, finished), 1e-12)
    good = met_slo(records, slo)
    weight = np.array([s.weight for s in slo])[records.class_id]
    several = records.output_tokens > 1
    return {
        "requests": float(len(records)),
        "unfinished": float((~finished).sum()),
        **_statistics("ttft", records.ttft_s),
        **_statistics("tpot", records.tpot_s[several]),
        **_statistics("e2e", records.e2e_s),
        "max_gap_p99_s": _statistics("max_gap", records.max_gap_s)["max_gap_p99_s"],
        "goodput": float((good * weight).sum() / weight.sum()) if weight.sum() > 0 else float("nan"),
        "goodput_rps": float(good.sum() / span),
        "throughput_rps": float(finished.sum() / span),
        "throughput_tokens_per_s": float(records.output_tokens[finished].sum() / span),
        "preemptions": float(records.preemptions.mean()),
        "lost_tokens": float(records.lost_tokens.mean()),
        "cache_hits": float(records.cached_tokens.sum() / records.prompt_tokens.sum()),
    }


def _span(records: Records, finished: np.ndarray) -> float:
    last = max(records.arrived_s.max(), records.finished_s[finished].max(initial=-np.inf))
    return float(last - records.arrived_s.min())


def _statistics(name: str, values: np.ndarray) -> dict[str, float]:
    values = values[np.isfinite(values)]
    if not values.size:
        return {f"{name}_{key}_s": float("nan") for key in ("mean", "p50", "p99")}
    p50, p99 = np.percentile(values, [50, 99])
    return {f"{name}_mean_s": float(values.mean()), f"{name}_p50_s": float(p50), f"{name}_p99_s": float(p99)}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its confidence interval; NaN half-width for a single seed."""

    mean: float
    half_width: float


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Student-t confidence interval of the mean over seeds; seeds where the metric is NaN are left out."""
    sample = np.asarray(values, np.float64)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return Interval(float("nan"), float("nan"))
    if sample.size == 1:
        return Interval(float(sample[0]), float("nan"))
    spread = sample.std(ddof=1) / np.sqrt(sample.size)
    return Interval(float(sample.mean()), float(stats.t.ppf(0.5 + level / 2, sample.size - 1) * spread))


def paired_difference(
    values: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray, level: float = 0.95
) -> Interval:
    """Interval of `values - reference`, seed by seed: common random numbers cancel what the seeds share.

    Raises:
        ValueError: for samples of unequal length.
    """
    sample, other = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if sample.shape != other.shape:
        raise ValueError(f"paired samples have {sample.size} and {other.size} seeds")
    return interval(sample - other, level)
