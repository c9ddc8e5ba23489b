"""The command as a whole: what it refuses, reloads and ends."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from servegym.agents.task import Task
from servegym.cli import main
from servegym.errors import InputError
from servegym.runtime.export import Origin, export_bundle
from servegym.runtime.gateway.serve import Gateway
from tests.runtime.gateway.engines import FakeEngine
from tests.runtime.gateway.running import QUICK, free_port, running, until
from tests.runtime.gateway.test_gateway import STREAM, TOKENS, run
from tests.runtime.test_bundle import network, observation

ENGINE = ("--engines", "http://127.0.0.1:1")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(network(), [observation(2, 2)], folder, Origin(policy="tiny", fallback="least_request"))
    return folder


@pytest.fixture
def bundle(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def changed(folder: Path) -> None:
    graph = folder / "policy.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("no_such_rule", *ENGINE), "name = 'no_such_rule'"),
        (("victim_largest", *ENGINE), "it answers preempt; a policy for dispatch is needed"),
        (("least_work_oracle", *ENGINE), "it reads the future"),
        (("lmetric", "--engines", "nonsense"), "engines = 'nonsense'"),
        (("lmetric", *ENGINE, "--engines-file", "engines"), "not both"),
        (("lmetric", *ENGINE, "--profile", "no_such_profile"), "no_such_profile"),
        (("lmetric", *ENGINE, "--fallback", "no_such_rule"), "no_such_rule"),
        (("lmetric", *ENGINE, "--budget-ms", "0"), "budget_ms = 0.0"),
        (("lmetric", *ENGINE, "--max-seqs", "100000"), "max_seqs = 100000"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(arguments, told, capsys):
    assert main(["gateway", "--no-envoy", *arguments]) == 2
    found = capsys.readouterr().err
    assert told in found
    assert "Traceback" not in found


def test_a_taken_port_is_refused_in_one_line(capsys):
    async def occupied() -> None:
        a = await FakeEngine().start()
        for name in ("picker", "metrics"):
            ports = {"picker": free_port(), "metrics": free_port(), name: a.port}
            flags = [f for key, port in ports.items() for f in (f"--{key}-port", str(port))]
            code = await asyncio.to_thread(
                main, ["gateway", "lmetric", "--no-envoy", "--engines", a.url, *flags]
            )
            assert code == 2
            assert f"{name}_port = {a.port}" in capsys.readouterr().err
        await a.stop()

    run(occupied)


def test_a_bundle_that_was_changed_by_a_byte_is_refused(bundle, capsys):
    changed(bundle)
    assert main(["gateway", str(bundle), "--no-envoy", *ENGINE]) == 2
    assert "the file was changed after export" in capsys.readouterr().err


def test_a_bundle_decides_and_is_loaded_anew(bundle, exported, capsys):
    async def test():
        async with running(FakeEngine(), FakeEngine(), policy=str(bundle)) as (gateway, envoy):
            decider = gateway.picker.decider
            assert (await envoy.post(STREAM)).body == TOKENS
            assert decider.counts["answered"] == 1, (decider.counts, decider.last_error)
            first = decider.policy
            changed(bundle)
            await gateway.reload()
            assert decider.policy is first
            assert (await envoy.post(STREAM)).status == 200
            shutil.copytree(exported, bundle, dirs_exist_ok=True)
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: decider.policy is not first)
            second = decider.policy
            await asyncio.gather(*(envoy.post(STREAM) for _ in range(5)))
            assert decider.counts["answered"] == 7
            os.utime(bundle / "manifest.json.sha256")
            await until(lambda: decider.policy is not second)

    run(test)
    told = capsys.readouterr().err
    assert told.count('"reload_refused"') == 1
    assert told.count('"reloaded"') == 2


def test_a_policy_for_other_questions_is_not_loaded_anew(bundle, exported, tmp_path, capsys):
    async def test():
        async with running(FakeEngine(), FakeEngine(), policy=str(bundle)) as (gateway, envoy):
            decider = gateway.picker.decider
            first = decider.policy
            origin = Origin(policy="victims", task=Task("ServeGym/Preempt-v0", ("preempt",)))
            export_bundle(network(), [observation(2, 2)], bundle, origin)
            await gateway.reload()
            assert decider.policy is first
            assert (await envoy.post(STREAM)).status == 200
            assert decider.counts["mismatch"] == 0

    run(test)
    assert "a policy for dispatch is needed" in capsys.readouterr().err


def test_a_new_bundle_is_loaded_though_the_list_of_engines_is_not(bundle, exported, tmp_path, capsys):
    async def test():
        a, listed = FakeEngine(), tmp_path / "engines"
        await a.start()
        listed.write_text(a.url)
        async with running(policy=str(bundle), engines=(), engines_file=str(listed)) as (gateway, _):
            first = gateway.picker.decider.policy
            listed.write_text("nonsense")
            await gateway.reload()
            assert gateway.picker.decider.policy is not first
        await a.stop()

    run(test)


def test_engines_in_a_file_are_read_again(tmp_path, capsys):
    async def test():
        a, b, listed = await FakeEngine().start(), FakeEngine(), tmp_path / "engines"
        listed.write_text(a.url)
        async with running(b, engines=(), engines_file=str(listed)) as (gateway, envoy):
            assert (await envoy.post(STREAM)).picked == [a.address]
            listed.write_text(f"{a.url}\n{b.url}")
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: gateway.picker.able() == [0, 1])
            listed.write_text(b.url)
            await gateway.reload()
            assert (await envoy.post(STREAM)).picked == [b.address]
            listed.write_text("nonsense")
            await gateway.reload()
            assert (await envoy.post(STREAM)).picked == [b.address]
            listed.write_text(f"{a.url}\n{b.url}")
            await gateway.reload()
            await until(lambda: gateway.picker.able() == [0, 1])
            answers = await asyncio.gather(*(envoy.post(STREAM) for _ in range(4)))
            assert {answer.served for answer in answers} == {a.address, b.address}
        await a.stop()

    run(test)
    assert capsys.readouterr().err.count('"reload_refused"') == 1


def used(gateway):
    return {engine.endpoint.address for engine in gateway.picker.books.engines if engine.is_listed}


def test_the_file_of_engines_is_not_read_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr("servegym.runtime.gateway.serve.CHANGED_S", 0.02)

    async def test():
        a, b, listed = await FakeEngine().start(), FakeEngine(), tmp_path / "engines"
        listed.write_text(f"{a.url}\nhttp://127.0.0.1:{free_port()}")
        async with running(b, engines=(), engines_file=str(listed)) as (gateway, _):
            await until(lambda: gateway.picker.able() == [0])  # the other is down, so names are looked up
            listed.write_text(b.url)
            await asyncio.sleep(0.3)
            assert a.address in used(gateway) and b.address not in used(gateway)
            await gateway.reload()
            assert used(gateway) == {b.address}
        await a.stop()

    run(test)


def test_an_engine_that_comes_back_under_another_address_is_found(monkeypatch):
    address, resolve = "127.0.0.9", socket.getaddrinfo

    def look_up(host, *rest, **more):
        return resolve(address if host == "engine.invalid" else host, *rest, **more)

    async def test():
        nonlocal address
        a, b = await FakeEngine().start(), await FakeEngine().start()
        urls = (f"http://engine.invalid:{a.port}", f"http://127.0.0.1:{free_port()}", b.url)
        async with running(engines=urls) as (gateway, envoy):
            assert (await envoy.post(STREAM)).picked == [b.address]
            address = "127.0.0.1"
            await until(lambda: gateway.picker.able() == [0, 2])
            assert (await envoy.post(STREAM, subset=[a.address])).body == TOKENS
        await a.stop()
        await b.stop()

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("servegym.runtime.gateway.serve.CHANGED_S", 0.1)
    run(test)


def test_a_name_that_does_not_resolve_is_told_and_holds_up_no_other(monkeypatch, capsys):
    known, resolve = {"b.invalid": "127.0.0.1"}, socket.getaddrinfo

    def look_up(host, *rest, **more):
        if host.endswith(".invalid") and host not in known:
            raise socket.gaierror(-2, "unknown")
        return resolve(known.get(host, host), *rest, **more)

    async def test():
        a, b = await FakeEngine().start(), await FakeEngine().start()
        urls = (f"http://a.invalid:{a.port}", f"http://b.invalid:{b.port}")
        async with running(engines=urls) as (gateway, envoy):
            assert (await envoy.post(STREAM)).picked == [b.address]
            assert capsys.readouterr().err.count('"unresolved"') == 1
            known["a.invalid"] = "127.0.0.1"
            await until(lambda: used(gateway) == {a.address, b.address})
            del known["a.invalid"]  # and where it was it still is
            await b.stop()
            await asyncio.sleep(0.5)
            assert used(gateway) == {a.address, b.address}
            assert (await envoy.post(STREAM)).served == a.address
        await a.stop()

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("servegym.runtime.gateway.serve.CHANGED_S", 0.1)
    run(test)


def test_a_heuristic_is_reloaded_as_itself():
    async def test():
        async with running(FakeEngine()) as (gateway, envoy):
            await gateway.reload()
            assert (await envoy.post(STREAM)).status == 200

    run(test)


def test_an_engine_that_is_down_from_the_start_is_told(capsys):
    async def test():
        async with running(FakeEngine(), engines=(f"http://127.0.0.1:{free_port()}",)) as (_, envoy):
            assert (await envoy.post(STREAM)).status == 503

    run(test)
    assert capsys.readouterr().err.count('"engine_down"') == 1


def test_sigterm_ends_the_program_with_0():
    async def test():
        a = await FakeEngine().start()
        command = [sys.executable, "-m", "servegym.cli", "gateway", "lmetric", "--no-envoy"]
        command += ["--engines", a.url, "--picker-port", str(free_port()), "--metrics-port", str(free_port())]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=subprocess.PIPE)
        while b'"ready"' not in (line := await process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        rest = await process.stderr.read()
        assert await process.wait() == 0
        assert b'"ended"' in rest
        assert b"Traceback" not in rest
        await a.stop()

    run(test)


def test_no_engine_at_all_still_starts_and_waits_for_one():
    async def test():
        port = free_port()
        settings = replace(
            QUICK, engines=(f"http://127.0.0.1:{port}",), picker_port=free_port(), metrics_port=free_port()
        )
        gateway, ready = Gateway(settings, "least_request"), asyncio.Event()
        task = asyncio.create_task(gateway.run(ready.set))
        await ready.wait()
        assert gateway.picker.able() == []
        engine = await FakeEngine(port=port).start()
        await until(lambda: gateway.picker.able() == [0])
        gateway.stop()
        assert await task == 0
        await engine.stop()

    run(test)


def test_torch_and_numba_are_not_needed():
    script = (
        "import sys\n"
        "for name in ('torch', 'numba', 'gymnasium'): sys.modules[name] = None\n"
        "import servegym.commands.gateway, servegym.runtime.gateway.serve\n"
        "import servegym.runtime.gateway.kv_events\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


def test_unknown_profile_in_python_raises():
    with pytest.raises(InputError):
        Gateway(replace(QUICK, engines=("http://127.0.0.1:1",), profile=("nope",)), "least_request")
