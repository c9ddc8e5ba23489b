"""`servegym gateway`: everything started, watched, reloaded and ended."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

from servegym.envs.cluster.spec import InstanceSpec
from servegym.errors import InputError
from servegym.runtime.bundle import MANIFEST, is_bundle
from servegym.runtime.decider import Decider
from servegym.runtime.gateway.books import Books
from servegym.runtime.gateway.envoy import UNPICKED, Envoy
from servegym.runtime.gateway.exchange import Exchange, Watch
from servegym.runtime.gateway.lengths import Lengths, load_tokenizer
from servegym.runtime.gateway.picker import Picker
from servegym.runtime.gateway.scrape import Watchman
from servegym.runtime.gateway.server import Server
from servegym.runtime.gateway.settings import (
    Endpoint,
    Settings,
    parse_endpoints,
    read_classes,
    read_engines,
)
from servegym.runtime.gateway.telemetry import Telemetry

# Pauses between looks: at the bundle's folder, at names of engines that are gone and at Envoy; and at what
# is still in flight, at the end.
CHANGED_S, LOOK_S = 2.0, 0.05
FAILED = 1


def serve(settings: Settings, policy: str, fallback: str | None) -> int:
    """Run a gateway until SIGTERM, SIGINT or Envoy's end; the exit code.

    Raises:
        InputError: flags, bundle, tokenizer or ports that cannot be used.
    """
    gateway = Gateway(settings, policy, fallback)
    try:
        return asyncio.run(gateway.run())
    except BaseExceptionGroup as group:  # what goes wrong in one of several tasks comes in a group
        raise _cause(group) from None


class Gateway:
    """A picker with all that belongs to it.

    Attributes:
        picker, telemetry, envoy: its parts; the last is None before it runs, and with --no-envoy.
    """

    def __init__(self, settings: Settings, policy: str, fallback: str | None = None) -> None:
        settings.check()
        self.settings, self.policy = settings, policy
        self._urls, self._listing = read_engines(settings), asyncio.Lock()
        endpoints = parse_endpoints(self._urls)
        self.classes = read_classes(settings.classes)
        self.telemetry = Telemetry(settings.log_requests)
        decider = Decider(policy, fallback, settings.budget_ms / 1e3, needs="dispatch")
        books = Books(
            endpoints,
            self._specs(endpoints),
            Lengths(load_tokenizer(settings.tokenizer)),
            max(service.priority for service in self.classes.values()),
        )
        self.picker = Picker(books, decider, settings)
        self._watch = Watch(settings.watch_per_s)
        self._begin = time.monotonic()
        self._unresolved: set[str] = set()
        self._tell_unresolved(endpoints)
        self._ending = asyncio.Event()
        self.envoy: Envoy | None = None

    def now(self) -> float:
        """Seconds on the view's clock."""
        return time.monotonic() - self._begin

    def stop(self) -> None:
        """Let requests in flight end, then `run`."""
        self._ending.set()

    async def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Serve; `ready` is called when requests are welcome.

        Raises:
            InputError: a port is taken, or Envoy does not come up.
        """
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            background = await self._start(stack, tasks)
            if self.settings.envoy:
                self.envoy = await Envoy.start(self.settings, self._engines())
                self._tell_envoy()  # what has changed while it came up
                stack.push_async_callback(self.envoy.stop)
                background.append(tasks.create_task(self._watch_envoy(self.envoy)))
            self._listen_to_signals(stack, tasks)
            # What lives now lives on: the collector need not look at it while requests wait.
            gc.collect()
            gc.freeze()
            self.telemetry.event("ready", **self._addresses())
            ready()
            code = await self._until_end()
            await self._drain()
            for task in background:
                task.cancel()
            return code

    async def _start(self, stack: AsyncExitStack, tasks: asyncio.TaskGroup) -> list[asyncio.Task]:
        """The picker: its server, metrics, scrapes and events; returns when every engine was asked once."""
        settings, books = self.settings, self.picker.books
        server = Server(self._open_exchange, self.telemetry, settings.max_body_bytes)
        await server.start(settings.host, settings.picker_port)
        stack.push_async_callback(server.stop, 1.0)
        try:
            stack.callback(self.telemetry.serve(self.picker, self.now, settings.host, settings.metrics_port))
        except OSError as error:
            raise InputError("gateway", "metrics_port", settings.metrics_port, str(error)) from error
        looked = asyncio.Event()
        watchman = Watchman(books, settings, self.telemetry, self.now, self._tell_envoy)
        background = [tasks.create_task(watchman.run(looked)), tasks.create_task(self._watch_names())]
        if settings.kv_events is not None:
            from servegym.runtime.gateway.kv_events import KVEvents  # late: pyzmq and msgpack are extras

            events = KVEvents(books, self.telemetry, settings.kv_events)
            background.append(tasks.create_task(events.run()))
        if is_bundle(self.policy):
            background.append(tasks.create_task(self._watch_folder()))
        await looked.wait()
        server.health.set_ready(True)
        self._server = server
        return background

    def _open_exchange(self) -> Exchange:
        return Exchange(
            self.picker, self.classes, self._watch, self.telemetry, self.now, self.settings.max_body_bytes
        )

    async def _until_end(self) -> int:
        """Wait for a signal, or for Envoy's end, which is a failure."""
        signalled = asyncio.create_task(self._ending.wait())
        if self.envoy is None:
            await signalled
            return 0
        died = asyncio.create_task(self.envoy.ended())
        await asyncio.wait((signalled, died), return_when=asyncio.FIRST_COMPLETED)
        for task in (signalled, died):
            task.cancel()
        if self._ending.is_set():
            return 0
        self.telemetry.event("envoy_ended", code=died.result())
        return FAILED

    async def _drain(self) -> None:
        """No new requests; those in flight may end."""
        self.telemetry.event("draining", inflight=len(self.picker.books.flights))
        self._server.health.set_ready(False)
        if self.envoy is not None:
            await self.envoy.drain()
        deadline = self.now() + self.settings.drain_s
        while await self._is_busy() and self.now() < deadline:
            await asyncio.sleep(LOOK_S)
        self.telemetry.event("ended", inflight=len(self.picker.books.flights))

    async def _is_busy(self) -> bool:
        """Whether anything is in flight; Envoy knows of requests that the picker did not see, too."""
        return bool(self.picker.books.flights) or (self.envoy is not None and await self.envoy.is_busy())

    # --- Envoy ------------------------------------------------------------------------------------------

    def _engines(self) -> dict[Endpoint, bool]:
        """Where engines listen, and whether each is up."""
        books = self.picker.books
        return {e.endpoint: books.view.instances[e.number].available for e in books.engines if e.is_listed}

    def _tell_envoy(self) -> None:
        """Of engines that have come or gone. Where none is up, Envoy may try them all."""
        if self.envoy is None:
            return
        engines = self._engines()
        try:
            self.envoy.list_engines(engines if any(engines.values()) else dict.fromkeys(engines, True))
        except OSError as error:  # the next change may be written
            self.telemetry.event("fault", error=repr(error), where="the list of engines for Envoy")

    async def _watch_envoy(self, envoy: Envoy) -> None:
        """Count the exchanges that Envoy gave up, because the picker was late or gone."""
        seen = 0
        while True:
            await asyncio.sleep(CHANGED_S)
            found = (await envoy.stats()).get(UNPICKED, seen)
            if found > seen:
                self.telemetry.unpicked(found - seen)
            seen = found

    # --- reload -----------------------------------------------------------------------------------------

    def _listen_to_signals(self, stack: AsyncExitStack, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        reload = lambda: tasks.create_task(self.reload())  # noqa: E731
        actions = {signal.SIGTERM: self.stop, signal.SIGINT: self.stop, signal.SIGHUP: reload}
        for number, action in actions.items():
            try:
                loop.add_signal_handler(number, action)
            except (ValueError, RuntimeError):  # not the main thread: whoever embeds it sees to signals
                return
            stack.callback(loop.remove_signal_handler, number)

    async def reload(self) -> None:
        """Take the engines anew, and the policy; what is refused leaves the present ones in place."""
        with self._refusing():
            await self._list_engines(read_engines(self.settings))
        await self._reload_policy()

    async def _reload_policy(self) -> None:
        with self._refusing():
            await asyncio.to_thread(self.picker.decider.reload, self.policy)
            self.telemetry.event("reloaded", policy=self.picker.decider.policy.name)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Input that is refused costs a line in the log."""
        try:
            yield
        except InputError as error:
            self.telemetry.event("reload_refused", error=str(error))

    async def _list_engines(self, urls: tuple[str, ...] | None = None) -> None:
        """Use these engines, or those of before, at the addresses that their names have now."""
        async with self._listing:  # a look-up of names may not end behind a newer list, and undo it
            self._urls, before = urls or self._urls, self._urls
            try:
                endpoints = await asyncio.to_thread(parse_endpoints, self._urls, self._engines())
            except InputError:
                self._urls = before
                raise
            self._tell_unresolved(endpoints)
            addresses = {endpoint.address for endpoint in endpoints}
            if addresses == {endpoint.address for endpoint in self._engines()}:
                return
            self.picker.books.list_engines(endpoints, self._specs(endpoints))
            self._tell_envoy()
            self.telemetry.event("engines", listed=sorted(addresses))

    def _tell_unresolved(self, endpoints: Sequence[Endpoint]) -> None:
        """Of engines whose names do not resolve, when they are others than before."""
        missing = {url.rstrip("/") for url in self._urls} - {endpoint.url for endpoint in endpoints}
        if missing - self._unresolved:
            self.telemetry.event("unresolved", engines=sorted(missing))
        self._unresolved = missing

    async def _watch_names(self) -> None:
        """Look for engines that are gone: they may come back under another address."""
        while True:
            await asyncio.sleep(CHANGED_S)
            engines = self._engines()
            if len(engines) < len(self._urls) or not all(engines.values()):
                with suppress(InputError):  # names that do not resolve yet
                    await self._list_engines()

    async def _watch_folder(self) -> None:
        """Reload the policy when an export has replaced the bundle."""
        seen = _version(self.policy)
        while True:
            await asyncio.sleep(CHANGED_S)
            found = _version(self.policy)
            if found not in (None, seen):
                seen = found
                await self._reload_policy()

    def _specs(self, endpoints: Sequence[Endpoint]) -> list[InstanceSpec]:
        """The engines as configured: all with one profile, or each with its own."""
        settings, profiles = self.settings, self.settings.profile
        if len(profiles) != len(self._urls):
            profiles = profiles * len(self._urls)
        own = {url.rstrip("/"): name for url, name in zip(self._urls, profiles, strict=False)}
        return [
            InstanceSpec(own[e.url], token_budget=settings.token_budget, max_seqs=settings.max_seqs)
            for e in endpoints
        ]

    def _addresses(self) -> dict[str, str]:
        host, settings = self.settings.host, self.settings
        addresses = {
            "picker": f"{host}:{settings.picker_port}",
            "metrics": f"http://{host}:{settings.metrics_port}",
        }
        return {"serves": f"http://{host}:{settings.port}", **addresses} if settings.envoy else addresses


def _cause(error: BaseException) -> BaseException:
    """The input error in a group, else its first."""
    while isinstance(error, BaseExceptionGroup):
        error = (error.subgroup(InputError) or error).exceptions[0]
    return error


def _version(folder: str) -> tuple[int, int] | None:
    """What changes when a bundle does; None while it is being replaced."""
    try:
        stat = (Path(folder) / f"{MANIFEST}.sha256").stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns
