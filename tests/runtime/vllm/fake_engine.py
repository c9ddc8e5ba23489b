"""A vLLM server in this process whose tokens are a function of the tokens before them.

The next token is a hash of all tokens so far, prompt included; so an answer that was put together wrongly,
with a token lost, doubled or computed from another prefix, differs from `answer` at once. Tokens of the class
`is_partial` carry no text: it comes with the next token, as with characters of several tokens.
"""

from __future__ import annotations

import asyncio
import json
import random
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

EOS = 1
VOCABULARY = 997


def next_token(tokens: Sequence[int]) -> int:
    digest = zlib.crc32(json.dumps(list(tokens)).encode())
    return EOS if digest % 251 == 0 else 2 + digest % (VOCABULARY - 2)


def is_partial(token: int) -> bool:
    return token % 5 == 0


def text_of(tokens: Sequence[int]) -> str:
    """The text of an answer: that of a partial token comes with the next one that is whole."""
    text, parts = "", list[str]()
    for token in tokens:
        if token == EOS:
            continue
        parts.append(str(token))
        if not is_partial(token):
            text, parts = f"{text} {'+'.join(parts)}", []
    return text


def tokenize(prompt: str | list[int]) -> list[int]:
    return list(prompt.encode(errors="replace")) if isinstance(prompt, str) else prompt


def answer(prompt: str | list[int], max_tokens: int, ignore_eos: bool = True) -> list[int]:
    tokens = tokenize(prompt)
    start = len(tokens)
    while len(tokens) < start + max_tokens:
        tokens = [*tokens, next_token(tokens)]
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[start:]


@dataclass
class FakeEngine:
    """One server.

    Attributes:
        delay_s: of a step: a chunk of one to three tokens, or a token of an answer that is not streamed.
        max_seqs: requests at a time; others wait.
        hangs: its core computes nothing any more, while it accepts requests and answers /metrics.
        hangs_after: steps after which that begins.
        hangs_at: the same for those with this among their `kv_transfer_params`.
        refuses: status that it answers instead of serving.
        breaks_after: chunks after which every stream breaks off.
        counts_tokens: whether /metrics tell of the engine's pace.
        steps, generated: steps and tokens so far.
        served: prompts of the requests that it got; open: those that it is answering.
    """

    delay_s: float = 0.002
    max_seqs: int = 8
    hangs: bool = False
    hangs_after: int | None = None
    hangs_at: str = ""
    refuses: int = 0
    breaks_after: int | None = None
    counts_tokens: bool = True
    steps: int = 0
    generated: int = 0
    seed: int = 0
    served: list[list[int]] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    kept: dict[str, list[int]] = field(default_factory=dict)
    open: dict[int, web.Request] = field(default_factory=dict)
    url: str = ""
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        self._slots, self._random = asyncio.Semaphore(self.max_seqs), random.Random(self.seed)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        port = int(self.url.rsplit(":", 1)[1]) if self.url else 0
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def die(self) -> None:
        """As under kill -9: connections break off, new ones are refused."""
        for request in list(self.open.values()):
            if request.transport is not None:
                request.transport.abort()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if self.refuses:
            return web.json_response({"error": {"message": "no", "code": self.refuses}}, status=self.refuses)
        try:
            tokens, most = tokenize(body["prompt"]), body.get("max_tokens", 16)
            good = tokens and all(type(t) is int for t in tokens) and 1 <= most <= 2000
        except (TypeError, KeyError, AttributeError):
            good = False
        if not good:
            return web.json_response({"error": {"message": "max_tokens", "code": 400}}, status=400)
        self.served.append(tokens)
        self.bodies.append(body)
        self.open[id(http)] = http
        try:
            if self._hangs_at(body.get("kv_transfer_params")):
                await asyncio.sleep(3600)
            return await (
                self._stream(http, body, tokens) if body.get("stream") else self._whole(body, tokens)
            )
        finally:
            del self.open[id(http)]

    async def _step(self, tokens: int = 1) -> None:
        if self.steps == self.hangs_after:
            self.hangs = True
        await asyncio.sleep(3600 if self.hangs else self.delay_s)
        self.steps, self.generated = self.steps + 1, self.generated + tokens

    def _hangs_at(self, params: object) -> bool:
        return isinstance(params, dict) and bool(params.get(self.hangs_at))

    async def _stream(self, http: web.Request, body: dict, tokens: list[int]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)  # as vLLM: the head comes at once, even to those who wait
        async with self._slots:
            return await self._write(response, http, body, tokens)

    async def _write(
        self, response: web.StreamResponse, http: web.Request, body: dict, tokens: list[int]
    ) -> web.StreamResponse:
        answer_ids = answer(tokens, body.get("max_tokens", 16), body.get("ignore_eos", False))
        at, chunks = 0, 0
        while at < len(answer_ids):
            some = answer_ids[at : at + self._random.randint(1, 3)]
            await self._step(len(some))
            if self.breaks_after is not None and chunks >= self.breaks_after:
                http.transport.abort()
                return response
            text = text_of(answer_ids[: at + len(some)])[len(text_of(answer_ids[:at])) :]
            choice = {"index": 0, "text": text, "finish_reason": None, "token_ids": some}
            if at == 0:
                choice["prompt_token_ids"] = tokens
            at, chunks = at + len(some), chunks + 1
            if at == len(answer_ids):
                stopped = some[-1] == EOS and not body.get("ignore_eos")
                choice["finish_reason"] = "stop" if stopped else "length"
            chunk = {"id": "x", "object": "text_completion", "model": "fake", "choices": [choice]}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _whole(self, body: dict, tokens: list[int]) -> web.Response:
        params = None
        asked = body.get("kv_transfer_params")
        if isinstance(asked, dict) and asked.get("do_remote_decode"):
            name = f"{self.url}/{len(self.kept)}"
            self.kept[name] = tokens
            params = {"do_remote_prefill": True, "remote_request_id": name}
        answer_ids = await self._compute(tokens, body)
        choice = {"index": 0, "text": text_of(answer_ids), "finish_reason": "length"}
        return web.json_response({"model": "fake", "choices": [choice], "kv_transfer_params": params})

    async def _compute(self, tokens: list[int], body: dict) -> list[int]:
        answer_ids = answer(tokens, body.get("max_tokens", 16))
        async with self._slots:
            for _ in answer_ids:
                await self._step()
        return answer_ids

    async def _chat(self, http: web.Request) -> web.Response:
        body = await http.json()
        self.bodies.append(body)
        if self.refuses:
            return web.json_response({"error": {}}, status=self.refuses)
        said = body["messages"][-1]["content"]
        await self._compute(tokenize(said), body)
        return web.json_response({"object": "chat.completion", "said": said})

    async def _detokenize(self, http: web.Request) -> web.Response:
        tokens = (await http.json())["tokens"]
        told = [token for token in tokens if token != EOS]
        begun = "\ufffd" if told and is_partial(told[-1]) else ""
        special = "</s>" if tokens and tokens[-1] == EOS else ""
        return web.json_response({"prompt": text_of(tokens) + begun + special})

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake"}]})

    async def _metrics(self, http: web.Request) -> web.Response:
        running = min(len(self.open), self.max_seqs)
        pace = (
            'vllm:time_to_first_token_seconds_count{engine="0",model_name="fake"} 0.0\n'
            f'vllm:generation_tokens_total{{engine="0",model_name="fake"}} {self.generated}.0\n'
            'vllm:inter_token_latency_seconds_sum{engine="0",model_name="fake"} 0.0\n'
        )
        return web.Response(
            text="# HELP vllm:num_requests_running x\n"
            f'vllm:num_requests_running{{engine="0",model_name="fake"}} {running}.0\n'
            f'vllm:num_requests_waiting{{engine="0",model_name="fake"}} {len(self.open) - running}.0\n'
            f'vllm:kv_cache_usage_perc{{engine="0",model_name="fake"}} {min(running / 16, 1)}\n'
            'vllm:num_preemptions_total{engine="0",model_name="fake"} 0.0\n'
            'vllm:cache_config_info{block_size="16",num_gpu_blocks="256",engine="0"} 1.0\n'
            + (pace if self.counts_tokens else "")
        )


@asynccontextmanager
async def engines(*some: FakeEngine) -> AsyncIterator[list[FakeEngine]]:
    for one in some:
        await one.start()
    try:
        yield list(some)
    finally:
        for one in some:
            await one.die()
