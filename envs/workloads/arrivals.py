"""Arrival processes. All times are float64 seconds, sorted, from the start of the window."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.signal import lfilter

GRID_S = 0.25  # the step on which the modulating rates were simulated when they were fitted


def gamma_arrivals(rng: np.random.Generator, count: int, rate_rps: float, cv: float = 1.0) -> np.ndarray:
    """Renewal process with gamma gaps of mean 1 / rate and coefficient of variation `cv`; 1 is Poisson.

    Shape 1 / cv^2 and scale cv^2 / rate, as in the Llumnix artifact (OSDI 2024).
    """
    gaps = rng.standard_gamma(1 / cv**2, count)
    return np.cumsum(gaps) * (cv**2 / rate_rps)


def modulated_arrivals(rng: np.random.Generator, count: int, arrival: dict[str, Any]) -> np.ndarray:
    """First `count` arrivals of the fitted arrival model of fits.json.

    A gamma renewal process of unit mean runs in operational time, the integral of
    base * exp(x_slow + x_fast); each x is a stationary Ornstein-Uhlenbeck process of standard deviation
    sigma, correlation time tau and mean -sigma^2 / 2, on a grid of 0.25 s. With `on_rate_rps` the rate is 0
    in OFF periods and each arrival is a batch of requests.
    """
    if "on_rate_rps" not in arrival:
        return _renewal(rng, count, arrival["rate_rps"], arrival)
    batch_mean = arrival["batch_mean"]
    sizes = rng.geometric(1 / batch_mean, count)
    batches = int(np.searchsorted(np.cumsum(sizes), count)) + 1
    starts = _renewal(rng, batches, arrival["on_rate_rps"] / batch_mean, arrival)
    return _expand_batches(rng, starts, sizes[:batches], arrival)[:count]


def _renewal(rng: np.random.Generator, count: int, base_rps: float, arrival: dict[str, Any]) -> np.ndarray:
    due = gamma_arrivals(rng, count, 1.0, arrival["gamma_shape"] ** -0.5)  # in operational time
    times, clock = _operational_clock(rng, due[-1], base_rps, arrival)
    return np.interp(due, clock, times)


def _operational_clock(
    rng: np.random.Generator, until: float, base_rps: float, arrival: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Grid of seconds and the operational time at each, long enough to reach `until`."""
    slow = _OrnsteinUhlenbeck(rng, arrival["slow_sigma"], arrival["slow_tau_s"])
    fast = _OrnsteinUhlenbeck(rng, arrival["fast_sigma"], arrival["fast_tau_s"])
    on_off = _OnOff(rng, arrival) if "on_rate_rps" in arrival else None
    steps = int(1.2 * until / (arrival["rate_rps"] / _batch_mean(arrival) * GRID_S)) + 64
    clock = [np.zeros(1)]
    while clock[-1][-1] < until:
        rates = base_rps * np.exp(slow.walk(steps) + fast.walk(steps))
        on_s = GRID_S if on_off is None else on_off.walk(steps)
        clock.append(clock[-1][-1] + np.cumsum(rates * on_s))
    total = np.concatenate(clock)
    return np.arange(len(total)) * GRID_S, total


def _batch_mean(arrival: dict[str, Any]) -> float:
    return arrival.get("batch_mean", 1.0)


class _OrnsteinUhlenbeck:
    """A stationary path, walked GRID_S a step: AR(1) with lag-1 correlation exp(-GRID_S / tau)."""

    def __init__(self, rng: np.random.Generator, sigma: float, tau_s: float) -> None:
        self.rng, self.sigma = rng, sigma
        self.lag1 = np.exp(-GRID_S / tau_s)
        self.last = sigma * rng.standard_normal()

    def walk(self, steps: int) -> np.ndarray:
        noise = self.sigma * np.sqrt(1 - self.lag1**2) * self.rng.standard_normal(steps)
        path, _ = lfilter([1.0], [1.0, -self.lag1], noise, zi=[self.lag1 * self.last])
        self.last = path[-1]
        return path - self.sigma**2 / 2


class _OnOff:
    """Alternating ON periods, exponential, and OFF periods, off_min_s + lognormal; starts ON."""

    def __init__(self, rng: np.random.Generator, arrival: dict[str, Any]) -> None:
        self.rng, self.arrival = rng, arrival
        self.now_s, self.switches = 0.0, np.zeros(1)  # switches: start ON, end ON, start ON, ...

    def walk(self, steps: int) -> np.ndarray:
        """Seconds spent ON in each of the next `steps` grid cells."""
        grid = self.now_s + np.arange(steps + 1) * GRID_S
        self.now_s = grid[-1]
        while self.switches[-1] <= self.now_s:
            self.switches = np.concatenate(
                [self.switches, self.switches[-1] + np.cumsum(self._periods(steps))]
            )
        on_s = np.diff(self.switches)
        on_s[1::2] = 0.0
        return np.diff(np.interp(grid, self.switches, np.concatenate([[0.0], np.cumsum(on_s)])))

    def _periods(self, steps: int) -> np.ndarray:
        a, pairs = self.arrival, 1 + int(steps * GRID_S / self.arrival["on_mean_s"])
        on_s = self.rng.exponential(a["on_mean_s"], pairs)
        off_s = a["off_min_s"] + self.rng.lognormal(a["off_mu"], a["off_sigma"], pairs)
        return np.stack([on_s, off_s], axis=1).ravel()


def _expand_batches(
    rng: np.random.Generator, starts: np.ndarray, sizes: np.ndarray, arrival: dict[str, Any]
) -> np.ndarray:
    """Requests of each batch, spaced by lognormal gaps; sorted."""
    gaps = rng.lognormal(arrival["batch_gap_mu"], arrival["batch_gap_sigma"], int(sizes.sum()))
    first = np.cumsum(sizes) - sizes
    elapsed = np.cumsum(gaps)
    return np.sort(np.repeat(starts - elapsed[first], sizes) + elapsed, kind="stable")
