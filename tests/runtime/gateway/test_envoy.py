"""A real Envoy in front of fake engines: `make test-envoy`."""

import asyncio
import base64
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from hpack import Encoder

import servegym.runtime.gateway.envoy as envoy_module
from servegym.errors import InputError
from servegym.runtime.gateway.envoy import HOLD, Envoy
from servegym.runtime.gateway.exchange import PICKED
from servegym.runtime.gateway.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS
from servegym.runtime.gateway.readings import ORCA_REQUEST
from servegym.runtime.gateway.serve import Gateway
from servegym.runtime.gateway.settings import parse_endpoints
from tests.runtime.gateway.engines import EVENT, FakeEngine
from tests.runtime.gateway.running import QUICK, free_port, until
from tests.runtime.gateway.test_gateway import STREAM, TOKENS, WHOLE, books_are_empty, run
from tests.runtime.gateway.test_http2 import frame

pytestmark = pytest.mark.envoy


class Client:
    """What a client of the gateway sees."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self._url, self._session = f"http://127.0.0.1:{gateway.settings.port}", session

    async def post(self, ask: dict | bytes, **headers: str) -> tuple[int, bytes, bool]:
        """Status, body, and whether it is whole."""
        data = ask if isinstance(ask, bytes) else json.dumps(ask).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.post(f"{self._url}/v1/completions", data=data, headers=named) as answer:
            body = b""
            try:
                async for piece in answer.content.iter_any():
                    body += piece
            except aiohttp.ClientPayloadError:
                return answer.status, body, False
            self.headers = answer.headers
            return answer.status, body, True

    async def get(self, path: str) -> int:
        async with self._session.get(self._url + path) as answer:
            return answer.status


@asynccontextmanager
async def behind_envoy(*engines: FakeEngine, policy="least_request", **flags) -> AsyncIterator[tuple]:
    for engine in engines:
        await engine.start()
    flags = {"engines": tuple(engine.url for engine in engines), **flags}
    ports = {name: free_port() for name in ("port", "picker_port", "metrics_port")}
    settings = replace(QUICK, envoy=True, **ports, **flags)
    gateway, ready = Gateway(settings, policy), asyncio.Event()
    task = asyncio.create_task(gateway.run(ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        await task
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        try:
            yield gateway, Client(gateway, session), task
        finally:
            gateway.stop()
            try:
                await asyncio.wait_for(task, 30)
            finally:
                for engine in engines:
                    await engine.stop()


def test_headers_and_load_reports_reach_the_picker(tmp_path):
    async def test():
        classes = tmp_path / "classes.toml"
        classes.write_text("[fast]\nttft_s = 0.2\n")
        report = {"named_metrics": {"kv_cache_usage_perc": 0.625, "num_requests_waiting": 9.0}}
        a = FakeEngine(orca="JSON " + json.dumps(report), gap_s=0.1)
        async with behind_envoy(a, scrape_s=30.0, classes=str(classes)) as (gateway, client, _):
            said = {"x_gateway_inference_objective": "fast", "x_session_id": "s", "x_slo_tpot_ms": "70"}
            books = gateway.picker.books
            asked = asyncio.create_task(client.post(STREAM, x_slo_ttft_ms="300", **said))
            await until(lambda: books.flights)
            (flight,) = books.flights.values()
            ask = flight.ask
            assert (ask.service, bool(ask.session), ask.ttft_s, ask.tpot_s) == ("fast", True, 0.3, 0.07)
            assert (await asked)[0] == 200
            x = books.view.instances[0]
            assert (x.seen_waiting, x.seen_kv_usage) == (9.0, 0.625)
            assert "endpoint-load-metrics" not in client.headers

    run(test)


@pytest.mark.parametrize("watch_per_s", [0.0, 1e6])
def test_requests_are_spread_and_answered_unchanged(watch_per_s):
    async def test():
        a, b = FakeEngine(first_s=0.5), FakeEngine(first_s=0.5)
        async with behind_envoy(a, b, watch_per_s=watch_per_s) as (gateway, client, _):
            answers = await asyncio.gather(*(client.post(STREAM) for _ in range(20)))
            assert answers == [(200, TOKENS, True)] * 20
            assert min(len(a.served), len(b.served)) >= 8
            assert a.served[0] == STREAM
            status, body, _ = await client.post(WHOLE)
            assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 5)
            assert await client.get("/v1/models") == 200
            await until(lambda: books_are_empty(gateway))
            counts = gateway.picker.decider.counts
            assert counts["answered"] == 21
            learns = watch_per_s > 0
            assert (gateway.picker.books.engines[0].tpot_ratio != 1.0) == learns

    run(test)


def test_an_engine_gets_a_request_as_it_was_sent_and_what_the_picker_set():
    async def test():
        a = FakeEngine()
        async with behind_envoy(a) as (_, client, _):
            assert (await client.post(STREAM, x_gateway_destination_endpoint="10.0.0.1:1"))[0] == 200
            head = a.headers[0].lower()
            assert f"content-length: {len(json.dumps(STREAM))}" in head
            assert "transfer-encoding" not in head
            assert f"{PICKED}: {a.address}" in head
            assert "10.0.0.1" not in head
            assert f"{ORCA_REQUEST}: json" in head

    run(test)


def test_a_request_with_trailers_is_answered():
    async def test():
        a, body = FakeEngine(), json.dumps(STREAM).encode()
        async with behind_envoy(a) as (gateway, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.settings.port)
            encoder = Encoder()
            head = [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", "/v1/completions"),
                (":authority", "g"),
            ]
            writer.write(
                PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, encoder.encode(head))
            )
            writer.write(frame(DATA, 0, 1, body))
            writer.write(frame(HEADERS, END_HEADERS | END_STREAM, 1, encoder.encode([("x-sum", "1")])))
            answer = b""
            while b"[DONE]" not in answer:
                answer += await asyncio.wait_for(reader.read(1 << 16), 10)
            writer.close()
            assert a.bodies == [body]
            assert gateway.picker.decider.counts["answered"] == 1

    run(test)


def test_a_header_that_is_no_text_is_no_way_around_the_picker():
    async def test():
        a = FakeEngine()
        async with behind_envoy(a) as (gateway, client, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.settings.port)
            body = json.dumps(STREAM).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nhost: g\r\nx-session-id: \xff\xfe\r\n"
            writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
            writer.close()
            assert (await client.post(STREAM))[0] == 200
            await until(lambda: books_are_empty(gateway))

    run(test)


def test_more_answers_in_flight_than_envoy_allows_by_default_are_all_in_the_books():
    async def test():
        a = FakeEngine(first_s=60.0)
        tasks: list[asyncio.Task] = []
        async with behind_envoy(a) as (gateway, client, _):
            for _ in range(55):  # some at a time, for all are in this process
                tasks.extend(asyncio.create_task(client.post(WHOLE)) for _ in range(20))
                await until(lambda: len(a.served) == len(tasks))
            assert len(gateway.picker.books.flights) == 1100
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: books_are_empty(gateway))

    run(test)


def test_what_has_no_body_goes_to_no_engine_that_is_down():
    async def test():
        a, b = FakeEngine(), FakeEngine()
        flags = {"scrape_s": 0.05, "probe_timeout_s": 0.2, "idle_timeout_s": 60.0}
        async with behind_envoy(a, b, **flags) as (gateway, client, _):
            a.hang = True
            await until(lambda: gateway.picker.able() == [1])
            await asyncio.sleep(0.2)  # until Envoy has read it
            for _ in range(8):
                assert await asyncio.wait_for(client.get("/v1/models"), 5) == 200
            a.hang = False
            await until(lambda: gateway.picker.able() == [0, 1])
            assert (await client.post(STREAM))[:2] == (200, TOKENS)

    run(test)


def test_the_head_of_a_stream_waits_for_its_first_token():
    async def test():
        a = FakeEngine(first_s=0.4, gap_s=0.2)
        async with behind_envoy(a) as (gateway, client, _):
            task = asyncio.create_task(client.post(STREAM))
            await until(lambda: a.running)
            flight = next(iter(gateway.picker.books.flights.values()))
            await asyncio.sleep(0.2)
            assert not flight.has_begun
            await until(lambda: flight.has_begun)
            assert flight.request.streamed_tokens <= 2  # and the rest comes as it is made
            assert await task == (200, TOKENS, True)

    run(test)


def test_an_engine_that_dies_under_load_loses_nothing_that_had_not_begun():
    async def test():
        a, b = FakeEngine(first_s=2.0), FakeEngine(first_s=2.0)
        async with behind_envoy(a, b) as (gateway, client, _):
            tasks = [asyncio.create_task(client.post(STREAM if k % 2 else WHOLE)) for k in range(60)]
            await until(lambda: len(a.served) + len(b.served) == 60)
            await a.stop()
            answers = await asyncio.gather(*tasks)
            assert [(status, whole) for status, _, whole in answers] == [(200, True)] * 60
            assert all(body == TOKENS or b"usage" in body for _, body, _ in answers)
            assert b.answered == 60
            await until(lambda: not gateway.picker.books.view.instances[0].available)
            assert (await client.post(STREAM))[0] == 200
            await until(lambda: books_are_empty(gateway))

    run(test)


def test_an_engine_whose_core_died_answers_500_and_the_request_goes_on():
    async def test():
        a, b = FakeEngine(status=500), FakeEngine()
        async with behind_envoy(a, b) as (_, client, _):
            answers = [await client.post(STREAM) for _ in range(4)]
            assert answers == [(200, TOKENS, True)] * 4

    run(test)


def test_a_request_that_no_engine_takes_gets_the_engine_s_answer():
    async def test():
        a, b = FakeEngine(status=400), FakeEngine(status=400)
        async with behind_envoy(a, b) as (_, client, _):
            assert (await client.post(STREAM))[:2] == (400, b'{"error": "no"}')
            assert len(a.bodies) + len(b.bodies) == 1

    run(test)


def test_a_stream_that_breaks_off_ends_there_and_is_not_sent_again():
    async def test():
        a, b = FakeEngine(die_after=2, gap_s=0.1), FakeEngine(die_after=2, gap_s=0.1)
        async with behind_envoy(a, b) as (gateway, client, _):
            assert await client.post(STREAM) == (200, EVENT * 2, False)
            assert len(a.served) + len(b.served) == 1
            await until(lambda: books_are_empty(gateway))

    run(test)


def test_an_engine_that_hangs_costs_an_idle_time_out():
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with behind_envoy(a, b, idle_timeout_s=0.5, scrape_s=60.0) as (_, client, _):
            a.hang = True
            answers = await asyncio.gather(*(client.post(STREAM) for _ in range(4)))
            assert answers == [(200, TOKENS, True)] * 4
            assert b.answered == 4

    run(test)


def test_a_stream_that_does_not_begin_in_time_goes_on_elsewhere_and_one_that_has_begun_stays():
    async def test():
        a, b = FakeEngine(gap_s=0.3), FakeEngine(gap_s=0.3)
        async with behind_envoy(a, b, first_token_timeout_s=0.6, scrape_s=60.0) as (gateway, client, _):
            a.hang = True
            answers = await asyncio.gather(*(client.post(STREAM) for _ in range(4)))
            assert answers == [(200, TOKENS, True)] * 4  # which takes 1.5 s
            assert b.answered == len(b.served) == 4
            assert not any("x-envoy" in head.lower() for head in b.headers)
            await until(lambda: books_are_empty(gateway))

    run(test)


def test_when_all_engines_hang_504():
    async def test():
        a = FakeEngine()
        async with behind_envoy(a, request_timeout_s=0.5, scrape_s=60.0) as (gateway, client, _):
            a.hang = True
            assert (await client.post(STREAM))[0] == 504
            await until(lambda: books_are_empty(gateway))

    run(test)


def test_shed_unavailable_and_too_large():
    async def test():
        a = FakeEngine(waiting=50)
        async with behind_envoy(a, max_body_mib=1) as (gateway, client, _):
            status, body, _ = await client.post({**STREAM, "priority": 1})
            assert (status, json.loads(body)["error"]["code"], client.headers["retry-after"]) == (
                429,
                429,
                "1",
            )
            assert (await client.post(b"x" * (2 << 20)))[0] == 413
            await a.stop()
            await until(lambda: not gateway.picker.books.view.instances[0].available)
            assert (await client.post(STREAM))[0] == 503

    run(test)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff" * 1000, b"[" * 50_000])
def test_bodies_that_cannot_be_read_are_the_engine_s_to_judge(body):
    async def test():
        a = FakeEngine(status=400)
        async with behind_envoy(a) as (_, client, _):
            assert (await client.post(body))[:2] == (400, b'{"error": "no"}')
            assert a.bodies == [body]

    run(test)


def test_without_its_picker_envoy_goes_on():
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with behind_envoy(a, b) as (gateway, client, _):
            await gateway._server.stop(0)
            answers = await asyncio.gather(*(client.post(STREAM) for _ in range(6)))
            assert answers == [(200, TOKENS, True)] * 6

    run(test)


def test_without_its_picker_envoy_still_loses_nothing_to_a_dead_engine():
    async def test():
        a, b, c = (FakeEngine(first_s=2.0) for _ in range(3))
        async with behind_envoy(a, b, c) as (gateway, client, _):
            await gateway._server.stop(0)
            tasks = [asyncio.create_task(client.post(STREAM)) for _ in range(30)]
            await until(lambda: len(a.served) + len(b.served) + len(c.served) == 30)
            assert a.running
            await a.stop()
            assert await asyncio.gather(*tasks) == [(200, TOKENS, True)] * 30

    run(test)


def test_a_picker_that_stalls_holds_nothing_up_for_longer_than_its_time():
    async def test():
        a = FakeEngine()
        async with behind_envoy(a) as (gateway, client, _):
            original = gateway.picker.pick

            def slow(*arguments):
                time.sleep(1.0)
                return original(*arguments)

            gateway.picker.pick = slow
            begin = asyncio.get_running_loop().time()
            assert (await client.post(STREAM))[:2] == (200, TOKENS)
            assert asyncio.get_running_loop().time() - begin < 3.0

    run(test)


def test_engines_come_and_go_without_a_restart(tmp_path):
    async def test():
        a, b, listed = FakeEngine(first_s=1.0, gap_s=0.2), FakeEngine(), tmp_path / "engines"
        await a.start()
        listed.write_text(a.url)
        async with behind_envoy(b, engines=(), engines_file=str(listed)) as (gateway, client, _):
            slow = asyncio.create_task(client.post(STREAM))
            await until(lambda: a.running)
            listed.write_text(b.url)
            await gateway.reload()
            await until(lambda: gateway.picker.able() == [1])
            for _ in range(4):
                await asyncio.sleep(0.1)
                assert (await client.post(STREAM))[:2] == (200, TOKENS)
            assert await slow == (200, TOKENS, True)
            assert (len(a.served), b.answered) == (1, 4)
            await gateway._server.stop(0)  # Envoy knows without the picker
            assert (await client.post(STREAM))[:2] == (200, TOKENS)
            assert b.answered == 5
        await a.stop()

    run(test)


def test_what_goes_on_without_the_picker_is_counted(monkeypatch):
    monkeypatch.setattr("servegym.runtime.gateway.serve.CHANGED_S", 0.1)

    async def test():
        a = FakeEngine()
        async with behind_envoy(a) as (gateway, client, _):
            await gateway._server.stop(0)
            for _ in range(3):
                assert (await client.post(STREAM))[0] == 200
            count = gateway.telemetry.registry.get_sample_value
            await until(lambda: count("servegym_unpicked_total") == 3)

    run(test)


def test_draining_waits_for_requests_that_the_picker_does_not_see():
    async def test():
        a = FakeEngine(gap_s=0.3)
        async with behind_envoy(a) as (gateway, client, task):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.settings.port)
            body = json.dumps(STREAM).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(body) + body[:10])  # the rest is still to come
            await asyncio.sleep(0.3)
            await gateway._server.stop(0)
            unseen = asyncio.create_task(client.post(STREAM))
            await until(lambda: a.running)
            gateway.stop()
            assert await unseen == (200, TOKENS, True)
            writer.write(body[10:])
            answer = b""
            while b"[DONE]" not in answer:
                answer += (got := await asyncio.wait_for(reader.read(1 << 16), 10))
                assert got
            writer.close()
            assert await asyncio.wait_for(task, 20) == 0

    run(test)


def test_draining_waits_for_clients_that_read_slowly(monkeypatch):
    monkeypatch.setattr("tests.runtime.gateway.engines.EVENT", b"data: " + b"x" * 100_000 + b"\n\n")

    async def test():
        a = FakeEngine()
        async with behind_envoy(a) as (gateway, _, task):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.settings.port, limit=1 << 16)
            body = json.dumps({**STREAM, "max_tokens": 75}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(body) + body)
            await until(lambda: a.served and books_are_empty(gateway))
            gateway.stop()
            answer, deadline = 0, asyncio.get_running_loop().time() + 20
            last = b""
            while b"[DONE]" not in last and asyncio.get_running_loop().time() < deadline:
                piece = await asyncio.wait_for(reader.read(1 << 16), 10)
                assert piece, f"cut after {answer} bytes"
                answer, last = answer + len(piece), last[-20:] + piece
                await asyncio.sleep(0.005)
            assert b"[DONE]" in last
            writer.close()
            assert await asyncio.wait_for(task, 20) == 0

    run(test)


def test_draining_lets_requests_end_and_takes_no_new_ones():
    async def test():
        a = FakeEngine(first_s=0.5)
        async with behind_envoy(a) as (gateway, client, task):
            slow = asyncio.create_task(client.post(STREAM))
            await until(lambda: a.running)
            gateway.stop()
            assert await slow == (200, TOKENS, True)
            assert await asyncio.wait_for(task, 20) == 0
            with pytest.raises(aiohttp.ClientConnectorError):
                await client.post(STREAM)

    run(test)


def test_envoy_s_end_ends_the_gateway():
    async def test():
        async with behind_envoy(FakeEngine()) as (gateway, _, task):
            os.kill(gateway.envoy.pid, signal.SIGKILL)
            assert await asyncio.wait_for(task, 20) == 1

    run(test)


def test_a_gateway_that_is_killed_takes_its_envoy_along():
    async def test():
        a, ports = await FakeEngine().start(), [free_port() for _ in range(3)]
        command = [sys.executable, "-m", "servegym.cli", "gateway", "lmetric", "--engines", a.url]
        for flag, port in zip(("--port", "--picker-port", "--metrics-port"), ports, strict=True):
            command += [flag, str(port)]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        while b'"ready"' not in (line := await process.stderr.readline()):
            assert line
        process.kill()
        await process.wait()

        def is_free() -> bool:
            with socket.socket() as tried:
                return tried.connect_ex(("127.0.0.1", ports[0])) != 0

        await until(is_free)
        await a.stop()

    run(test)


def test_what_changes_while_envoy_comes_up_reaches_it(monkeypatch):
    start = Envoy.start

    async def slow(settings, engines):
        envoy = await start(settings, engines)
        await b.start()
        await until(lambda: gateways[0].picker.able() == [0, 1])
        return envoy

    async def test():
        nonlocal b
        await b.start()
        await b.stop()
        a = FakeEngine()
        await a.start()
        async with behind_envoy(engines=(a.url, b.url)) as (gateway, client, _):
            a.hang = True
            await until(lambda: gateway.picker.able() == [1])
            await asyncio.sleep(0.2)
            for _ in range(4):
                assert await asyncio.wait_for(client.get("/v1/models"), 5) == 200
        await a.stop()
        await b.stop()

    b, gateways, made = FakeEngine(), [], Gateway.__init__

    def remember(gateway, *arguments):
        made(gateway, *arguments)
        gateways.append(gateway)

    monkeypatch.setattr(Gateway, "__init__", remember)
    monkeypatch.setattr(Envoy, "start", slow)
    run(test)


def test_a_taken_port_is_told_though_it_is_another_envoy_s():
    async def test():
        async with behind_envoy(FakeEngine()) as (gateway, _, _):
            for port in (gateway.picker.books.engines[0].endpoint.port, gateway.settings.port):
                settings = replace(gateway.settings, port=port)
                with pytest.raises(InputError, match=f"port {port}"):
                    await Envoy.start(settings, dict.fromkeys(parse_endpoints(settings.engines), True))

    run(test)


def test_the_filter_is_what_its_source_says():
    from wasmtime import wat2wasm

    source = Path(envoy_module.__file__).with_name("hold.wat").read_text(encoding="utf-8")
    assert base64.b64decode(HOLD) == wat2wasm(source)
