"""One engine replica: a model, its KV memory and a scheduler, one iteration after the other.

Instances of one process share weights and a lock, which guards all schedulers; forward passes run outside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from threading import Condition, RLock

import torch

from servegym.envs.cluster.settings import Setting
from servegym.errors import InputError
from servegym.runtime.engine.batch import build_batch
from servegym.runtime.engine.graphs import DecodeGraphs
from servegym.runtime.engine.memory import allocate_cache
from servegym.runtime.engine.model import Transformer
from servegym.runtime.engine.request import Request, make_request
from servegym.runtime.engine.scheduler import Plan, Scheduler
from servegym.runtime.engine.swap import SwapSpace
from servegym.runtime.steady import keep_freed_memory


class Instance:
    """A replica that is stepped from outside, or by `serve` on a thread of its own.

    Args:
        model: shared by instances.
        setting: as the cluster model has it (`setting_of_spec`); synchronous scheduling only.
        unit_tokens: tokens of a prefix unit; 0 for no prefix cache.
        lock: the lock of the cluster that it belongs to.

    Attributes:
        stream, copies: on CUDA, where its iterations run, and what leaves it for another instance.
        idle: what `serve` does while there is nothing to run; None: it sleeps.

    Raises:
        InputError: settings that this runtime or this device cannot have.
    """

    def __init__(
        self,
        model: Transformer,
        setting: Setting,
        number: int = 0,
        unit_tokens: int = 0,
        lock: RLock | None = None,
    ) -> None:
        keep_freed_memory()
        self.model, self.setting, self.number = model, setting, number
        is_cuda = model.device.type == "cuda"
        self.stream, self.copies = (torch.cuda.Stream(model.device) if is_cuda else None for _ in range(2))
        try:
            self.cache = allocate_cache(
                model.config, setting.blocks, setting.block_tokens, model.device, model.dtype
            )
        except RuntimeError as error:  # CUDA's out-of-memory error is one, too
            hint = "so many do not fit; calibrate with --neighbours, or give less"
            raise InputError("engine", "kv_blocks", setting.blocks, hint) from error
        self.swap = SwapSpace(self.cache, setting.host_blocks, setting.swap_group)
        self.lock = lock or RLock()
        self.changed = Condition(self.lock)
        self.scheduler = Scheduler(setting, self.swap, number, unit_tokens, kick=self._kick)
        self.graphs: DecodeGraphs | None = None
        self.on_done: Callable[[list[Request]], None] = lambda _: None
        self.idle: Callable[[], object] | None = None
        self._kicked = self._stopped = False
        if self.stream:  # weights and the zeros of the KV were written on the thread's own stream
            self.stream.wait_stream(torch.cuda.current_stream(model.device))

    @property
    def most_tokens(self) -> int:
        """Longest request, prompt and output, that it can serve."""
        room = (self.setting.blocks - self.setting.watermark) * self.setting.block_tokens
        return min(room, self.model.config.positions)

    # --- requests ---------------------------------------------------------------------------------------

    def submit(self, r: Request) -> None:
        """Put a request on the waiting list.

        Raises:
            InputError: a request that never fits.
        """
        if len(r.ids) > self.most_tokens:
            hint = f"instance {self.number} holds at most {self.most_tokens}"
            raise InputError(f"request {r.number}", "prompt + output tokens", len(r.ids), hint)
        with self.changed:
            self.scheduler.enqueue(r)

    def clear(self) -> None:
        """Forget all requests, who waits for them, and everything that is cached."""
        with self.changed:
            self.scheduler.clear()
            self.on_done = lambda _: None
            self._stopped = False

    # --- iterations -------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Let torch initialise itself, and capture CUDA graphs."""
        self.warm_thread()
        if self.stream:
            width = -(-self.most_tokens // self.setting.block_tokens)
            # A graph that dies frees its stream's cuBLAS workspace (pytorch #193402): before others use it.
            self.graphs = None
            with torch.cuda.stream(self.stream), torch.inference_mode():
                self.graphs = DecodeGraphs(self.model, self.cache, self.setting.max_seqs, width)
        self.clear()

    def warm_thread(self) -> None:
        """Run the largest prompt of one iteration, so that this thread has its buffers."""
        self.submit(make_request(0, [0] * min(self.setting.budget, self.most_tokens - 2), 2))
        while self.step():
            pass
        with self.changed:
            self.scheduler.clear()

    def step(self) -> bool:
        """One iteration: schedule, swap, compute, sample, deliver. False where there was nothing to run."""
        with torch.cuda.stream(self.stream):
            with self.changed:
                plan = self.scheduler.schedule()
                self._kicked = False
            if not plan:
                return False
            with torch.inference_mode():
                tokens = self.forward(plan)().tolist()
        now = time.perf_counter()
        with self.changed:
            done = self.scheduler.complete(tokens, now)
            if done:
                self.on_done(done)
        return True

    def serve(self) -> None:
        """Run iterations until `stop`; while there is nothing to run, `idle` again and again, or sleep."""
        while not self._stopped:
            if not self.step():
                if self.idle:
                    self.idle()
                    continue
                with self.changed:
                    self.changed.wait_for(lambda: self._kicked or self._stopped)

    def stop(self) -> None:
        """Let `serve` return after the iteration in flight."""
        with self.changed:
            self._stopped = True
            self.changed.notify()

    def forward(self, plan: Plan) -> Callable[[], torch.Tensor]:
        """The forward pass of an iteration, ready to run: each request's next token."""
        decodes = [r for r, _ in plan if r.decoding]
        chunks = plan[len(decodes) :]
        batch = build_batch(decodes, chunks, self.setting.block_tokens, self.model.device)
        if self.graphs and not chunks:
            return partial(self.graphs.run, batch)
        return partial(self.model.next_tokens, batch, self.cache)

    def _kick(self) -> None:
        self._kicked = True
        self.changed.notify()
