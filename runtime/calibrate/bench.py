"""The thin runtime as a `Bench`: requests are put in place, then one ordinary iteration is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
import torch

from servegym.runtime.calibrate.machine import timed
from servegym.runtime.calibrate.shapes import LEAST_CONTEXT, Shape
from servegym.runtime.engine.batch import build_batch
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.request import Request, make_request

ROUNDS = 25  # of the smallest iteration, for its fixed part
MORE = 4  # output tokens: no request finishes in the iteration that is timed


class EngineBench:
    """One instance that runs single iterations; its KV holds whatever was there before."""

    def __init__(self, instance: Instance, seed: int = 0) -> None:
        self._instance, self._rng = instance, np.random.default_rng(seed)
        self._vocabulary = instance.model.config.vocabulary
        self._device = instance.model.device.type

    def run(self, shape: Shape) -> float:
        """Seconds from the start of scheduling to the last token's delivery."""
        self._place(shape)
        self._wait()
        start = perf_counter()
        self._instance.step()
        self._wait()
        return perf_counter() - start

    def _place(self, shape: Shape) -> None:
        self._instance.clear()
        for context in shape.contexts:
            self._instance.place(self._request(context - 1), context - 1)
        for new, past in shape.chunks:
            self._instance.place(self._request(past + new), past)

    def overheads(self) -> tuple[float, float]:
        """Seconds of the smallest iteration beside its forward pass, and until that pass is launched.

        The first is what scheduling, batching and delivery cost; both are medians.
        """
        smallest = Shape((LEAST_CONTEXT,))
        whole = median(self.run(smallest) for _ in range(ROUNDS))
        launches, passes = [], []
        for _ in range(ROUNDS):
            forward = self._forward(smallest)
            self._wait()
            start = perf_counter()
            forward()
            launches.append(perf_counter() - start)
            passes.append(timed(forward, self._device))
        return max(whole - median(passes), 0.0), median(launches)

    def _forward(self, shape: Shape) -> Callable[[], object]:
        """The forward pass of a shape, as an iteration runs it."""
        self._place(shape)
        instance = self._instance
        plan = instance.scheduler.schedule()
        decodes = [r for r, _ in plan if r.decoding]
        batch = build_batch(
            decodes, plan[len(decodes) :], instance.setting.block_tokens, instance.model.device
        )
        if instance.graphs and len(decodes) == len(plan):
            return partial(instance.graphs.run, batch)
        return partial(instance.model.forward, batch, instance.cache)

    def _request(self, prompt: int) -> Request:
        return make_request(0, self._rng.integers(self._vocabulary, size=prompt), MORE)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
