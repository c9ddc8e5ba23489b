"""Requests through a real Envoy to fake engines: `make test-envoy`."""

import asyncio
import json
import time

import pytest
from hpack import Encoder

from servegym.runtime.gateway.exchange import PICKED
from servegym.runtime.gateway.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS
from servegym.runtime.gateway.readings import ORCA_REQUEST
from tests.runtime.gateway.behind import begin, behind_envoy, until_done
from tests.runtime.gateway.engines import EVENT, FakeEngine
from tests.runtime.gateway.running import until
from tests.runtime.gateway.test_gateway import STREAM, TOKENS, WHOLE, books_are_empty, run
from tests.runtime.gateway.test_http2 import frame

pytestmark = pytest.mark.envoy


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
            await until_done(reader)
            writer.close()
            assert a.bodies == [body]
            assert gateway.picker.decider.counts["answered"] == 1

    run(test)


def test_a_header_that_is_no_text_is_no_way_around_the_picker():
    async def test():
        a = FakeEngine()
        async with behind_envoy(a) as (gateway, client, _):
            body = json.dumps(STREAM).encode()
            reader, writer = await begin(gateway, len(body), b"x-session-id: \xff\xfe")
            writer.write(body)
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
