"""A vLLM server in this process that batches continuously and takes known times for its iterations.

It schedules as vLLM does where KV is not short: decodes first, then prompts in order of arrival within the
token budget, without whole cached blocks. Every iteration that it ran is kept, for tests to look at.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

from servegym.runtime.calibrate.shapes import Shape


@dataclass(eq=False)
class Running:
    prompt: list[int]
    most: int
    salt: str | None
    computed: int = 0
    tokens: asyncio.Queue = field(default_factory=asyncio.Queue)
    given: int = 0


@dataclass
class BatchingEngine:
    """One server.

    Attributes:
        seconds: of an iteration of some shape.
        caching: whether it keeps whole blocks of prompts.
        fails_after: iterations after which it drops all connections, `failures` times.
        interval: tokens that an event carries.
        refuses: status that it answers instead of serving.
        labels: of its metrics; several where several engines stand behind one address.
        page: more of its metrics.
        late_s: what its front end takes for a request that is not streamed.
        ran: every iteration.
    """

    seconds: Callable[[Shape], float]
    token_budget: int = 64
    max_seqs: int = 4
    max_model_len: int = 256
    blocks: int = 129
    block_tokens: int = 16
    caching: bool = True
    fails_after: int | None = None
    failures: int = 10**9
    interval: int = 1
    refuses: int = 0
    labels: tuple[str, ...] = ("",)
    page: str = ""
    late_s: float = 0.0
    ran: list[Shape] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    waiting: list[Running] = field(default_factory=list)
    cached: set[tuple] = field(default_factory=set)
    hits: int = 0
    begun: int = 0
    generated: int = 0
    url: str = ""

    async def start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self._work = asyncio.Event()
        self._task = asyncio.create_task(self._iterate())

    async def stop(self) -> None:
        self._task.cancel()
        await self._runner.cleanup()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.0"})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "steady", "max_model_len": self.max_model_len}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        size = f'block_size="{self.block_tokens}",num_gpu_blocks="{self.blocks}"'
        return web.Response(
            text="".join(
                f"vllm:num_requests_running{{{label}}} {len(self.running)}.0\n" for label in self.labels
            )
            + f"vllm:num_requests_waiting{{}} {len(self.waiting)}.0\n{self.page}"
            "vllm:kv_cache_usage_perc{} 0.0\n"
            f"vllm:prefix_cache_hits_total{{}} {self.hits}.0\n"
            f"vllm:time_to_first_token_seconds_count{{}} {self.begun}.0\n"
            f"vllm:generation_tokens_total{{}} {self.generated}.0\n"
            "vllm:inter_token_latency_seconds_sum{} 0.0\n"
            f"vllm:cache_config_info{{{size}}} 1.0\n"
        )

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if self.refuses:
            return web.json_response({"error": "no"}, status=self.refuses)
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return web.json_response({"error": "too long"}, status=400)
        if self.late_s and not body.get("stream"):
            await asyncio.sleep(self.late_s)
        request = Running(body["prompt"], body["max_tokens"], salt=body.get("cache_salt"))
        self.waiting.append(request)
        self._work.set()
        try:
            if not body.get("stream"):
                return await self._whole(request, http)
            response = web.StreamResponse()
            await response.prepare(http)
            for k in range(1, request.most + 1):
                if await request.tokens.get() is None:
                    http.transport.abort()
                    return response
                if k % self.interval and k < request.most:
                    continue
                event = {"choices": [{"text": ""}], "usage": {"completion_tokens": k}}
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            for queue in (self.running, self.waiting):
                if request in queue:
                    queue.remove(request)

    async def _whole(self, request: Running, http: web.Request) -> web.Response:
        for _ in range(request.most):
            if await request.tokens.get() is None:
                http.transport.abort()
                break
        return web.json_response({"usage": {"completion_tokens": request.most}})

    def _schedule(self) -> tuple[Shape, list[tuple[Running, int]]]:
        budget, plan, contexts, chunks = self.token_budget, [], [], []
        for r in self.running:
            if r.given:
                plan.append((r, 1))
                contexts.append(len(r.prompt) + r.given)
                budget -= 1
        while self.waiting and len(self.running) < self.max_seqs:
            self.running.append(self._admit(self.waiting.pop(0)))
        for r in self.running:
            new = min(len(r.prompt) - r.computed, budget)
            if not r.given and new > 0:
                plan.append((r, new))
                chunks.append((new, r.computed))
                budget -= new
        return Shape(tuple(contexts), tuple(chunks)), plan

    def _admit(self, r: Running) -> Running:
        for end in range(self.block_tokens, len(r.prompt), self.block_tokens):
            if (r.salt, *r.prompt[:end]) not in self.cached:
                break
            r.computed = end
            self.hits += self.block_tokens
        return r

    async def _iterate(self) -> None:
        while True:
            if not self.running and not self.waiting:
                self._work.clear()
                await self._work.wait()
            shape, plan = self._schedule()
            await asyncio.sleep(self.seconds(shape))
            self.ran.append(shape)
            lost = self.fails_after is not None and len(self.ran) > self.fails_after and self.failures > 0
            self.failures -= lost
            for r, new in plan:
                self._complete(r, new, lost)

    def _complete(self, r: Running, new: int, lost: bool) -> None:
        if lost:
            r.tokens.put_nowait(None)
        elif r.computed < len(r.prompt):
            r.computed += new
            if self.caching:
                ends = range(self.block_tokens, r.computed + 1, self.block_tokens)
                self.cached |= {(r.salt, *r.prompt[:end]) for end in ends}
        if r.computed == len(r.prompt):
            r.given += 1
            self.generated += 1
            self.begun += r.given == 1
            r.tokens.put_nowait(7)
            if r.given == r.most and r in self.running:
                self.running.remove(r)
