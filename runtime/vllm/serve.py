"""Start a migrator in front of running vLLM servers."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import aiohttp
from aiohttp import web

from servegym.envs.cluster.spec import InstanceSpec
from servegym.errors import InputError
from servegym.runtime.decider import Decider
from servegym.runtime.fleet import InstanceSettings
from servegym.runtime.gateway.settings import parse_endpoints
from servegym.runtime.keep_alive import keep_alive
from servegym.runtime.view import InstanceView
from servegym.runtime.vllm.leg import EngineLostError
from servegym.runtime.vllm.migrator import Limits, Migrator, scrape
from servegym.runtime.vllm.proxy import make_app
from servegym.runtime.vllm.pulse import CONNECT_S

log = logging.getLogger("servegym.migrator")
START_S = 60.0  # for which a server may still be starting
KEEP_ALIVE_S = 2.0  # vLLM closes idle connections after 5 s; a request just then would find it dead


@dataclass(kw_only=True)
class Settings:
    """Flags of `servegym migrator`."""

    engines: tuple[str, ...]
    """Base URLs of vLLM servers of one model, for example http://127.0.0.1:8101 http://127.0.0.1:8102."""
    profile: tuple[str, ...] = ("a100-llama-3.1-8b",)
    """Cost profile (see `servegym profile`, `servegym calibrate`) of all engines, or one an engine."""
    max_seqs: int | None = None
    """The engines' max_num_seqs; the profile's by default."""
    token_budget: int | None = None
    """The engines' max_num_batched_tokens; the profile's by default."""
    handoff: Literal["none", "nixl"] = "none"
    """How KV moves: `none` computes it again, `nixl` reads it from the server that is left; both run the
    NixlConnector as kv_both. Without RDMA or shared memory, and without NIXL's progress thread (num_threads 0
    in kv_connector_extra_config), a read waits until that server has work."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Where clients connect."""
    period_s: float = 0.5
    """Seconds between two occasions to migrate; 0 never migrates."""
    scrape_s: float = 0.1
    """Seconds between two scrapes of an engine's /metrics."""
    stale_s: float = 2.0
    """Age of the oldest scrape beyond which decisions are left to the fallback, and of its own beyond which
    an engine gets no requests."""
    stall_s: float = 60.0
    """Seconds for which a request hears nothing while its engine's count of generated tokens stands still,
    after which the engine counts as hung and its requests go on elsewhere."""
    rest_s: float = 5.0
    """Seconds for which a failed engine gets no requests, at least."""
    patience_s: float = 10.0
    """Seconds for which an answer that has begun waits for an engine, where none is left."""
    handoff_s: float = 10.0
    """Seconds for which a server may let a hand-off of KV wait, before the KV is computed again."""
    budget_ms: float = 5.0
    """CPU time of an answer; a policy that takes longer rests, and the fallback decides."""

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            InputError: naming the flag.
        """
        if not self.engines:
            raise InputError("migrator", "engines", [], "give at least one URL")
        if len(self.profile) not in (1, len(self.engines)):
            raise InputError("migrator", "profile", list(self.profile), "give one, or one an engine")
        if not 0 <= self.port <= 65535:
            raise InputError("migrator", "port", self.port, "must lie in 0..65535")
        for name in ("budget_ms", *(field.name for field in fields(Limits))):
            value, least = getattr(self, name), 0 if name in ("period_s", "rest_s", "patience_s") else 1e-3
            if not least <= value <= 1e6:
                raise InputError("migrator", name, value, f"must lie in {least:g}..1e6")

    def limits(self) -> Limits:
        """The times among the flags."""
        return Limits(*(getattr(self, field.name) for field in fields(Limits)))


def serve(settings: Settings, policy: str, fallback: str | None) -> int:
    """Serve until a signal; returns 0."""
    settings.check()
    parse_endpoints(settings.engines)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    decider = Decider(policy, fallback, settings.budget_ms * 1e-3)
    if not {"dispatch", "migrate"} & set(decider.policy.kinds):
        hint = f"it answers {', '.join(decider.policy.kinds)}; dispatch or migrate is needed"
        raise InputError("migrator", "policy", policy, hint)
    web.run_app(
        _app(settings, decider),
        host=settings.host,
        port=settings.port,
        handler_cancellation=True,
        access_log=None,
        print=log.info,
    )
    return 0


async def _app(settings: Settings, decider: Decider) -> web.Application:
    session = open_session(settings.stall_s)
    try:
        migrator = await make_migrator(session, settings, decider)
    except BaseException:
        await session.close()
        raise
    app = make_app(migrator)

    async def close(_: web.Application) -> None:
        await session.close()

    app.on_cleanup.append(close)
    log.info("%s decides for %s; KV hand-off: %s", decider.policy.name, migrator.urls, settings.handoff)
    return app


def open_session(stall_s: float) -> aiohttp.ClientSession:
    """A client without limit of connections, whose requests wait `stall_s` for a byte, or as they say.

    A connection that is dropped in silence breaks, though its engine works on for others.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=stall_s)
    connector = aiohttp.TCPConnector(
        limit=0,
        keepalive_timeout=KEEP_ALIVE_S,
        socket_factory=lambda info: keep_alive(socket.socket(*info[:3])),
    )
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


async def make_migrator(
    session: aiohttp.ClientSession, settings: Settings, decider: Decider, wait_s: float = START_S
) -> Migrator:
    """A migrator for running servers, whose KV caches are as large as they say.

    Raises:
        InputError: a server does not answer within `wait_s`, or settings contradict each other.
    """
    urls = [url.rstrip("/") for url in settings.engines]
    profiles: Sequence[str] = settings.profile * (len(urls) if len(settings.profile) == 1 else 1)
    instances = [
        await _instance(session, settings, url, profile, wait_s)
        for url, profile in zip(urls, profiles, strict=True)
    ]
    return Migrator(
        urls, instances, decider, session, limits=settings.limits(), handoff=settings.handoff == "nixl"
    )


async def _instance(
    session: aiohttp.ClientSession, settings: Settings, url: str, profile: str, wait_s: float
) -> InstanceView:
    until, is_told = time.monotonic() + wait_s, False
    while True:
        try:
            reading = await scrape(session, url)
            break
        except EngineLostError as error:
            if time.monotonic() > until:
                hint = f"give the address of a running vLLM server ({error.__cause__})"
                raise InputError("migrator", "engines", url, hint) from error
            if not is_told:
                is_told = True
                log.info("waiting for %s, up to %g s", url, wait_s)
            await asyncio.sleep(0.5)
    spec = InstanceSpec(profile, max_seqs=settings.max_seqs, token_budget=settings.token_budget)
    if reading.blocks:
        spec = replace(spec, kv_blocks=reading.blocks, block_tokens=reading.block_tokens)
    return InstanceView(InstanceSettings.of(spec, migrates=True))
