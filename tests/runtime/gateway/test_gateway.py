"""The picker over real gRPC, between a fake Envoy and fake engines that misbehave."""

import asyncio
import json
import socket
import sys

import aiohttp
import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servegym.runtime.gateway.server import PROCESSOR
from tests.runtime.gateway.engines import EVENT, FakeEngine
from tests.runtime.gateway.envoys import DUPLEX, MODES
from tests.runtime.gateway.fuzzing import METHOD
from tests.runtime.gateway.running import running, until

STREAM = {"prompt": "hello " * 50, "max_tokens": 5, "stream": True}
WHOLE = {**STREAM, "stream": False}
TOKENS = EVENT * 5 + b"data: [DONE]\n\n"
BUSY = {"waiting": 50, "usage": 0.9}


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def books_are_empty(gateway) -> bool:
    books = gateway.picker.books
    return not books.flights and all(
        not x.inflight and not x.prefill_tokens and not x.prompt_tokens and not x.streamed_tokens
        for x in books.view.instances
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("watch_per_s", [0.0, 1e6])
def test_requests_are_spread_and_answered_unchanged(mode, watch_per_s):
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with running(a, b, mode=mode, watch_per_s=watch_per_s) as (gateway, envoy):
            answers = await asyncio.gather(*(envoy.post(STREAM) for _ in range(8)))
            assert [(x.status, x.body) for x in answers] == [(200, TOKENS)] * 8
            answer = await envoy.post(WHOLE)
            assert json.loads(answer.body)["usage"]["completion_tokens"] == 5
            assert min(len(a.served), len(b.served)) >= 4
            assert a.served[0] == STREAM
            assert "endpoint-load-metrics-format: json" in a.headers[0].lower()
            await until(lambda: books_are_empty(gateway))
            learns = mode == DUPLEX or watch_per_s > 0
            assert (gateway.picker.books.engines[0].tpot_ratio != 1.0) == learns

    run(test)


def test_a_long_body_in_pieces_comes_back_whole():
    async def test():
        engine = FakeEngine()
        async with running(engine, mode=DUPLEX) as (_, envoy):
            long = {"prompt": "x" * 100_000, "max_tokens": 2}
            assert (await envoy.post(long)).status == 200
            assert engine.served == [long]

    run(test)


def test_an_engine_that_dies_under_load_loses_nothing_that_had_not_begun():
    async def test():
        a, b = FakeEngine(first_s=2.0), FakeEngine(first_s=2.0)
        async with running(a, b) as (gateway, envoy):
            asks = [envoy.post(STREAM if k % 2 else WHOLE) for k in range(20)]
            tasks = [asyncio.create_task(ask) for ask in asks]
            await until(lambda: len(a.served) + len(b.served) == 20)
            await a.stop()
            answers = await asyncio.gather(*tasks)
            assert [x.status for x in answers] == [200] * 20
            assert all(x.whole and (x.body == TOKENS or b"usage" in x.body) for x in answers)
            assert {x.served for x in answers} == {b.address}
            await until(lambda: not gateway.picker.books.view.instances[0].available)
            assert (await envoy.post(STREAM)).picked == [b.address]
            await until(lambda: books_are_empty(gateway))

    run(test)


def test_a_stream_that_breaks_off_ends_there_and_is_not_sent_again():
    async def test():
        a, b = FakeEngine(die_after=2), FakeEngine(die_after=2)
        async with running(a, b) as (gateway, envoy):
            answer = await envoy.post(STREAM)
            assert (answer.status, answer.whole) == (200, False)
            assert answer.body == EVENT * 2
            assert len(a.served) + len(b.served) == 1
            await until(lambda: books_are_empty(gateway))

    run(test)


def test_an_engine_comes_back():
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with running(a, b) as (gateway, envoy):
            port, instances = a.port, gateway.picker.books.view.instances
            await a.stop()
            await until(lambda: not instances[0].available)
            again = await FakeEngine(port=port).start()
            await until(lambda: instances[0].available)
            for _ in range(4):
                assert (await envoy.post(STREAM)).status == 200
            assert again.served
            await again.stop()

    run(test)


def test_an_engine_that_hangs_gets_no_more_requests():
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with running(a, b, probe_timeout_s=0.1, down_after=2) as (gateway, envoy):
            a.hang = True
            await until(lambda: not gateway.picker.books.view.instances[0].available)
            answers = await asyncio.gather(*(envoy.post(STREAM) for _ in range(4)))
            assert {(x.status, x.served) for x in answers} == {(200, b.address)}

    run(test)


def test_an_engine_that_says_it_is_ill_gets_no_more_requests():
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with running(a, b) as (gateway, _):
            a.health = 503
            await until(lambda: not gateway.picker.books.view.instances[0].available)
            a.health = 200
            await until(lambda: gateway.picker.books.view.instances[0].available)

    run(test)


@pytest.mark.parametrize("metrics", ["", "vllm:num_requests_running NaN", "x" * (5 << 20), "vllm:" * 9999])
def test_metrics_that_lie_leave_the_choice_to_the_fallback(metrics):
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with running(a, b, stale_s=0.2) as (gateway, envoy):
            a.metrics = metrics
            counts = gateway.picker.decider.counts
            assert (await envoy.post(STREAM)).status == 200
            await asyncio.sleep(0.3)
            before = counts["stale"]
            assert (await envoy.post(STREAM)).status == 200
            assert counts["stale"] == before + 1
            assert all(x.available for x in gateway.picker.books.view.instances)

    run(test)


def test_without_an_engine_503_and_under_overload_429():
    async def test():
        a = FakeEngine(**BUSY)
        async with running(a, retry_after_s=7) as (gateway, envoy):
            shed = await envoy.post({**STREAM, "priority": 1})
            assert (shed.status, shed.headers["retry-after"]) == (429, "7")
            assert json.loads(shed.body)["error"]["code"] == 429
            assert (await envoy.post({**STREAM, "priority": 0})).status == 200
            await a.stop()
            await until(lambda: not gateway.picker.books.view.instances[0].available)
            none = await envoy.post(STREAM)
            assert (none.status, none.headers["content-type"]) == (503, "application/json")

    run(test)


def test_the_load_that_an_answer_reports_is_read():
    async def test():
        report = {"named_metrics": {"kv_cache_usage_perc": 0.625, "num_requests_waiting": 9.0}}
        a = FakeEngine(orca="JSON " + json.dumps(report))
        async with running(a, scrape_s=30.0) as (gateway, envoy):
            assert (await envoy.post(STREAM)).status == 200
            x = gateway.picker.books.view.instances[0]
            assert (x.seen_waiting, x.seen_kv_usage) == (9.0, 0.625)

    run(test)


@pytest.mark.parametrize("mode", MODES)
def test_the_subset_hint_is_honoured(mode):
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with running(a, b, mode=mode) as (_, envoy):
            for _ in range(3):
                assert (await envoy.post(STREAM, subset=[b.address])).picked == [b.address]
            assert (await envoy.post(STREAM, subset=[])).status == 503

    run(test)


def test_a_conversation_stays_where_its_session_s_last_turn_ran():
    async def test():
        engines = [FakeEngine() for _ in range(3)]
        async with running(*engines, policy="session_affinity") as (_, envoy):
            answers = [await envoy.post(STREAM, x_session_id=f"s{k % 3}") for k in range(9)]
            for k in range(9):
                assert answers[k].served == answers[k % 3].served

    run(test)


def test_metrics_of_the_picker():
    async def test():
        a = FakeEngine()
        async with running(a) as (gateway, envoy):
            await envoy.post(STREAM)
            await until(lambda: books_are_empty(gateway))
            url = f"http://127.0.0.1:{gateway.settings.metrics_port}/metrics"
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                lines = (await response.text()).splitlines()
            assert f'servegym_requests_total{{engine="{a.address}",status="200"}} 1.0' in lines
            assert 'servegym_decisions_total{reason="answered"} 1.0' in lines
            assert f'servegym_engine_available{{engine="{a.address}"}} 1.0' in lines
            assert "servegym_decision_seconds_count 1.0" in lines

    run(test)


def test_health_follows_grpc_s_protocol_and_draining():
    async def test():
        a = FakeEngine(first_s=0.5)
        async with running(a) as (gateway, envoy):
            address = f"127.0.0.1:{gateway.settings.picker_port}"
            async with grpc.aio.insecure_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)

                async def state(service: str) -> str:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

                for service in ("", "liveness", "readiness", PROCESSOR):
                    assert await state(service) == "SERVING"
                slow = asyncio.create_task(envoy.post(STREAM))
                await until(lambda: a.running)
                gateway.stop()
                await until(lambda: gateway._ending.is_set())
                while await state("readiness") != "NOT_SERVING":
                    await asyncio.sleep(0.01)
                assert await state("liveness") == "SERVING"
                assert (await slow).body == TOKENS  # it may end

    run(test)


def test_an_engine_that_says_it_is_ill_stays_down():
    async def test():
        a, b = FakeEngine(), FakeEngine()
        async with running(a, b, scrape_s=0.02) as (gateway, _):
            a.health = 503
            instance = gateway.picker.books.view.instances[0]
            await until(lambda: not instance.available)
            for _ in range(100):
                await asyncio.sleep(0.02)
                assert not instance.available
            a.health = 200
            await until(lambda: instance.available)

    run(test)


def test_refusals_are_no_first_tokens():
    async def test():
        a = FakeEngine(status=500)
        async with running(a) as (gateway, envoy):
            assert (await envoy.post(STREAM)).status == 500
            count = "servegym_ttft_seconds_count"
            assert gateway.telemetry.registry.get_sample_value(count) == 0
            a.status = 200
            assert (await envoy.post(STREAM)).status == 200
            assert gateway.telemetry.registry.get_sample_value(count) == 1

    run(test)


def test_a_first_message_that_is_none_is_refused_and_goes_not_past_the_picker():
    async def test():
        async with running(FakeEngine()) as (gateway, _):
            address = f"127.0.0.1:{gateway.settings.picker_port}"
            async with grpc.aio.insecure_channel(address) as channel:
                method = channel.stream_stream(METHOD, lambda data: data, pb.ProcessingResponse.FromString)
                call = method()
                await call.write(b"\xff\xff")
                assert (await call.read()).immediate_response.status.code == 400

    run(test)


def test_a_client_whose_machine_is_gone_is_noticed():
    async def test():
        async with running(FakeEngine()) as (gateway, envoy):
            assert (await envoy.post(STREAM)).status == 200
            (connection,) = gateway._server._connections
            raw = connection._transport.get_extra_info("socket")
            assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if sys.platform == "linux":
                assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
                assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000

    run(test)
