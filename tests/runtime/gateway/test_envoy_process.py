"""A real Envoy's life beside its picker: start, list of engines, drain, end. `make test-envoy`."""

import asyncio
import base64
import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

import servegym.runtime.gateway.envoy as envoy_module
from servegym.errors import InputError
from servegym.runtime.gateway.envoy import HOLD, Envoy
from servegym.runtime.gateway.serve import Gateway
from servegym.runtime.gateway.settings import parse_endpoints
from tests.runtime.gateway.behind import begin, behind_envoy, until_done
from tests.runtime.gateway.engines import FakeEngine
from tests.runtime.gateway.running import free_port, until
from tests.runtime.gateway.test_gateway import STREAM, TOKENS, books_are_empty, run

pytestmark = pytest.mark.envoy


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
            body = json.dumps(STREAM).encode()
            reader, writer = await begin(gateway, len(body))
            writer.write(body[:10])  # the rest is still to come
            await asyncio.sleep(0.3)
            await gateway._server.stop(0)
            unseen = asyncio.create_task(client.post(STREAM))
            await until(lambda: a.running)
            gateway.stop()
            assert await unseen == (200, TOKENS, True)
            writer.write(body[10:])
            await until_done(reader)
            writer.close()
            assert await asyncio.wait_for(task, 20) == 0

    run(test)


def test_draining_waits_for_clients_that_read_slowly(monkeypatch):
    monkeypatch.setattr("tests.runtime.gateway.engines.EVENT", b"data: " + b"x" * 100_000 + b"\n\n")

    async def test():
        a = FakeEngine()
        async with behind_envoy(a) as (gateway, _, task):
            body = json.dumps({**STREAM, "max_tokens": 75}).encode()
            reader, writer = await begin(gateway, len(body))
            writer.write(body)
            await until(lambda: a.served and books_are_empty(gateway))
            gateway.stop()
            await until_done(reader, pause_s=0.005)
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
