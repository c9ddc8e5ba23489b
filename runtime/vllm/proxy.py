"""The migrator's HTTP side: an OpenAI server in front of vLLM servers.

    POST /v1/completions        streamed or not; moves between engines
    POST /v1/chat/completions   goes to the engine that the policy chooses, and stays
    GET  /v1/models, /health, /metrics

It answers as vLLM does; errors have OpenAI's form.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from servegym.errors import InputError
from servegym.runtime.vllm.completion import Completion, read_completion
from servegym.runtime.vllm.leg import EngineLostError, EngineRefusedError
from servegym.runtime.vllm.migrator import Migrator
from servegym.runtime.vllm.pulse import PATIENT
from servegym.runtime.vllm.relay import Relay
from servegym.runtime.vllm.splice import Piece

MOST_BYTES = 64 * 2**20
_MIGRATOR = web.AppKey("migrator", Migrator)


def make_app(migrator: Migrator) -> web.Application:
    """The server; it scrapes and migrates while it runs."""
    app = web.Application(client_max_size=MOST_BYTES)
    app[_MIGRATOR] = migrator
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    app.cleanup_ctx.append(_watching)
    return app


async def _watching(app: web.Application) -> AsyncIterator[None]:
    task = asyncio.create_task(app[_MIGRATOR].watch())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _completions(http: web.Request) -> web.StreamResponse:
    try:
        completion = read_completion(await http.read())
    except InputError as error:
        return _error(400, str(error))
    if completion.pinned:
        return await _pass(http, completion)
    async with _placed(http, completion) as relay:
        if relay is None:
            return _unavailable()
        answer = _Answer(completion, relay)
        try:
            return await (answer.stream(http) if completion.stream else answer.collect())
        except EngineRefusedError as error:
            return web.Response(status=error.status, body=error.body, content_type="application/json")
        except EngineLostError as error:
            return _error(503, f"no engine answers: {error}", {"Retry-After": "1"})


async def _chat(http: web.Request) -> web.StreamResponse:
    try:
        completion = read_completion(await http.read())
    except InputError as error:
        return _error(400, str(error))
    completion.pinned = "messages"
    return await _pass(http, completion)


@asynccontextmanager
async def _placed(http: web.Request, completion: Completion) -> AsyncIterator[Relay | None]:
    """The request at an engine; None where there is none."""
    migrator = http.app[_MIGRATOR]
    completion.headers = _forwarded(http)
    relay = migrator.admit(completion)
    try:
        yield relay if migrator.place(relay, set()) else None
    finally:
        migrator.finish(relay)


class _Answer:
    """Pieces as OpenAI's JSON."""

    def __init__(self, completion: Completion, relay: Relay) -> None:
        self._completion, self._relay = completion, relay
        self._head: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
        self._head["created"] = int(time.time())
        self._begun = False

    async def stream(self, http: web.Request) -> web.StreamResponse:
        """Server-sent events; errors before the first piece are raised, later ones are an event."""
        async with aclosing(self._relay.pieces()) as pieces:
            first = await anext(pieces)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(http)
            await response.write(self._event(self._chunk(first)))
            try:
                async for piece in pieces:
                    await response.write(self._event(self._chunk(piece)))
            except (EngineLostError, EngineRefusedError) as error:
                await response.write(self._event(_error_body(503, f"the answer broke off: {error}")))
            else:
                if self._completion.include_usage:
                    await response.write(
                        self._event({**self._named(), "choices": [], "usage": self._usage()})
                    )
            await response.write(b"data: [DONE]\n\n")
            return response

    async def collect(self) -> web.Response:
        """The whole answer at once."""
        whole = Piece()
        async with aclosing(self._relay.pieces()) as pieces:
            async for piece in pieces:
                whole.text += piece.text
                whole.token_ids += piece.token_ids
                whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
        return web.json_response({**self._chunk(whole), "usage": self._usage()})

    def _chunk(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._completion.wants_ids:
            choice["prompt_token_ids"] = None if self._begun else self._relay.splice.prompt
            choice["token_ids"] = piece.token_ids
        self._begun = True
        return {**self._named(), "choices": [choice]}

    def _named(self) -> dict[str, Any]:
        return {**self._head, "model": self._relay.model}

    def _usage(self) -> dict[str, int]:
        prompt, output = len(self._relay.splice.prompt or ()), len(self._relay.splice.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    @staticmethod
    def _event(body: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


async def _pass(http: web.Request, completion: Completion) -> web.StreamResponse:
    """Hand a request that may not move to one engine as it is; to others while none has begun to answer."""
    migrator = http.app[_MIGRATOR]
    body, failed = await http.read(), set[int]()
    async with _placed(http, completion) as relay:
        if relay is None:
            return _unavailable()
        while True:
            at = relay.request.instance
            try:
                async with migrator.pulses[at].listening():
                    answer = await migrator.session.post(
                        migrator.urls[at] + http.path,
                        data=body,
                        headers={**completion.headers, "Content-Type": "application/json"},
                        timeout=PATIENT,
                    )
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                migrator.lost(at, EngineLostError(repr(error)))
            else:
                async with answer:
                    if answer.status != 429 and answer.status < 500:
                        return await _copy(http, answer, migrator, relay)
            failed.add(at)
            if not migrator.place(relay, failed):
                return _unavailable()
            migrator.note("recovered")


async def _copy(
    http: web.Request, answer: aiohttp.ClientResponse, migrator: Migrator, relay: Relay
) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
    await response.prepare(http)
    at = relay.request.instance
    while True:
        try:
            async with migrator.pulses[at].listening():
                data = await answer.content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            migrator.lost(at, EngineLostError(repr(error)))
            if http.transport is not None:  # a cut-off body must not look complete
                http.transport.abort()
            return response
        if not data:
            return response
        migrator.streamed(relay, data.count(b"data: {"))
        await response.write(data)


async def _models(http: web.Request) -> web.StreamResponse:
    migrator = http.app[_MIGRATOR]
    for url, instance in zip(migrator.urls, migrator.view.instances, strict=True):
        if instance.available:
            try:
                async with migrator.session.get(url + http.path, headers=_forwarded(http)) as answer:
                    return web.Response(
                        status=answer.status, body=await answer.read(), content_type=answer.content_type
                    )
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                migrator.lost(migrator.urls.index(url), EngineLostError(repr(error)))
    return _unavailable()


async def _health(http: web.Request) -> web.Response:
    ready = any(one.available for one in http.app[_MIGRATOR].view.instances)
    return web.Response(status=200 if ready else 503)


async def _metrics(http: web.Request) -> web.Response:
    return web.Response(text=http.app[_MIGRATOR].tally.text(), content_type="text/plain")


def _forwarded(http: web.Request) -> dict[str, str]:
    return {"Authorization": key} if (key := http.headers.get("Authorization")) else {}


def _unavailable() -> web.Response:
    return _error(503, "no engine is available", {"Retry-After": "1"})


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(_error_body(status, message), status=status, headers=headers)


def _error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": " ".join(message.split()), "type": kind, "code": status}}
