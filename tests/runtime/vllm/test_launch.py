"""The launcher: command lines, what is said where vLLM is missing, and a real server from start to kill."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise

import pytest

from servegym.errors import InputError
from servegym.runtime.vllm import launch as room
from servegym.runtime.vllm.launch import EngineSettings, free_ports, launch, tiny_model, vllm_python


def test_command_line_stays_on_loopback_and_passes_on_what_is_given():
    settings = EngineSettings(
        kv_blocks=12,
        scheduler="a.b.C",
        config={"servegym": {"policy": "victim_largest"}},
        arguments=("--scheduling-policy", "priority"),
    )
    line = settings.command("python", "model", 8101)
    flags = dict(pairwise(line))
    assert (flags["--host"], flags["--port"]) == ("127.0.0.1", "8101")
    assert flags["--num-gpu-blocks-override"] == "12"
    assert flags["--scheduler-cls"] == "a.b.C"
    assert json.loads(flags["--additional-config"]) == {"servegym": {"policy": "victim_largest"}}
    assert line[-2:] == ["--scheduling-policy", "priority"]


def test_free_ports_differ():
    assert len(set(free_ports(20))) == 20


def test_free_ports_are_nobody_elses(monkeypatch):
    taken, free = free_ports(2)
    monkeypatch.setattr(room, "PORTS", [taken, free])
    with socket.socket() as one:
        one.bind(("127.0.0.1", taken))
        assert {port for _ in range(20) for port in free_ports(1)} == {free}


def test_interpreter_is_named_by_the_variable(monkeypatch):
    monkeypatch.setenv(room.PYTHON, sys.executable)
    assert str(vllm_python()) == sys.executable
    monkeypatch.setenv(room.PYTHON, "/nowhere/python")
    with pytest.raises(InputError, match="SERVEGYM_VLLM_PYTHON"):
        vllm_python()


def test_missing_vllm_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv(room.PYTHON, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="make test-vllm"):
        vllm_python()


def test_interpreter_without_tokenizers_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "CACHE", tmp_path)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no tokenizers >&2; exit 3\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(InputError, match="no tokenizers"):
        tiny_model(python)
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


@pytest.fixture
def no_vllm(monkeypatch, tmp_path):
    """Servers that are a few lines of Python: `serve` answers /health, `fail` ends at once."""
    monkeypatch.setattr(room, "vllm_python", lambda: sys.executable)

    def command(self, python, model, port):
        return [str(python), "-c", self.arguments[0], str(port)]

    monkeypatch.setattr(EngineSettings, "command", command)
    return lambda code: EngineSettings(model=tmp_path, arguments=(code,))


SERVE = """
import os, sys, http.server
os.fork()  # a child in the same group, as the engine is of the API server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
class Server(http.server.HTTPServer):
    allow_reuse_port = True
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_servers_serve_inside_the_block_and_are_gone_behind_it(no_vllm, tmp_path):
    with launch(no_vllm(SERVE), 2, tmp_path) as engines:
        assert all(engine.healthy() for engine in engines)
        assert len({engine.port for engine in engines}) == 2
        engines[0].kill()
        assert not engines[0].healthy()
        assert engines[1].healthy()
    assert not engines[1].healthy()
    assert engines[1].process.returncode == -signal.SIGTERM


def test_a_server_that_ends_is_named_with_its_log(no_vllm, tmp_path):
    with (
        pytest.raises(InputError, match=r"exit code = 5.*out of blocks"),
        launch(no_vllm("import sys; print('out of blocks'); sys.exit(5)"), 1, tmp_path),
    ):
        pass


def test_a_server_that_never_serves_is_given_up(no_vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(room.Engine.wait, "__defaults__", (0.5,))
    with (
        pytest.raises(InputError, match="not after"),
        launch(no_vllm("import time; time.sleep(60)"), 1, tmp_path),
    ):
        pass


def test_sigterm_takes_the_servers_along(tmp_path):
    code = f"""
import sys, time
from servegym.runtime.vllm import launch as room
room.vllm_python = lambda: sys.executable
room.EngineSettings.command = lambda self, python, model, port: [python, "-c", {SERVE!r}, str(port)]
with room.launch(room.EngineSettings(model=".")) as (engine,):
    print(engine.port, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)


@pytest.mark.vllm
def test_model_is_the_same_each_time(tmp_path):
    digests = []
    for name in ("a", "b"):
        subprocess.run([str(vllm_python()), str(room.BUILDER), str(tmp_path / name)], check=True)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 4


@pytest.mark.vllm
def test_real_server_answers_the_same_twice_and_dies_when_killed(tmp_path):
    with launch(EngineSettings(), folder=tmp_path) as (engine,):
        body = json.dumps(
            {
                "model": room.NAME,
                "prompt": list(range(1, 60)),
                "max_tokens": 48,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
        ).encode()
        request = urllib.request.Request(
            f"{engine.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        answers = [json.load(urllib.request.urlopen(request, timeout=60))["choices"][0] for _ in range(2)]
        assert answers[0]["token_ids"] == answers[1]["token_ids"]
        assert len(set(answers[0]["token_ids"])) > 30  # it does not run in circles
        engine.kill()
        time.sleep(0.2)
        assert not engine.healthy()
