"""The scheduler inside real vLLM: victims by a bundle, tokens as without preemption, seams in place."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from servegym.runtime.vllm.launch import ENVIRONMENT, tiny_model, vllm_python

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[3]
PROFILE = "a100-llama-3.1-8b"
CHECKPOINT = ROOT / "checkpoints" / "Preempt-v0" / "ppo-scarce-s0"


def in_vllm(*line: str) -> str:
    """Run Python with vLLM in it; returns what it prints."""
    variables = {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **ENVIRONMENT}
    done = subprocess.run(
        [str(vllm_python()), *line],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    from servegym.cli import main

    folder = tmp_path_factory.mktemp("bundle") / "preempt"
    assert main(["export", "-i", str(CHECKPOINT), "-o", str(folder)]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def played(bundle) -> dict[str, Any]:
    script = str(Path(__file__).with_name("preempting.py"))
    model = str(tiny_model())
    out = in_vllm(script, model, PROFILE, bundle, "victim_largest")
    assert f"ServeGym: {bundle} chooses what gives way" in out
    found = json.loads(out.splitlines()[-1])
    found["runs"] = {"bundle": found["runs"].pop(bundle), **found["runs"]}
    return {**found, "stock": json.loads(in_vllm(script, model).splitlines()[-1])}


BREAK_AND_LOOK = """
from servegym.runtime.vllm import seams
print()
print("now", *seams.moved(), sep="|")
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
schedule, preempt = Scheduler.schedule, Scheduler._preempt_request
def other(self, throttle_prefills=False, more=1): pass
Scheduler.schedule = other
print("schedule", *seams.moved(), sep="|")
Scheduler.schedule = schedule
del Scheduler._preempt_request
print("preempt", *seams.moved(), sep="|")
Scheduler._preempt_request = preempt
seams.FIELDS["request"] += ("urgency",)
print("field", *seams.moved(), sep="|")
"""


def test_a_seam_that_moves_is_named():
    lines = in_vllm("-c", BREAK_AND_LOOK).splitlines()[-4:]
    found = {line.split("|")[0]: line.split("|")[1:] for line in lines}
    assert found["now"] == [], f"vLLM has changed under the scheduler: {found['now']}"
    assert found["schedule"][0] == (
        "AsyncScheduler.schedule takes (self, throttle_prefills, more), not (self, throttle_prefills)"
    )
    assert any("max(self.running" in line for line in found["schedule"])
    assert "AsyncScheduler._preempt_request is gone" in found["preempt"]
    assert found["field"] == ["Request no longer sets urgency"]


def test_tokens_are_those_without_preemption(played):
    assert played["noise"] == 0, "the reference was to be without preemption"
    events = [event for run in played["runs"].values() for event in run["log"]]
    assert sum("gone" in event for event in events) > 100
    assert played["stock"]["preemptions"] > 30
    for name, run in [*played["runs"].items(), ("stock", played["stock"])]:
        assert run["tokens"] == played["quiet"], name
    assert played["shortest"] == played["quiet"][: len(played["shortest"])]


@pytest.mark.parametrize("policy", ["bundle", "victim_largest"])
def test_who_was_chosen_gives_way_and_keeps_its_priority(played, policy):
    log = played["runs"][policy]["log"]
    pairs = [(a, b) for a, b in itertools.pairwise(log) if "asked" in a]
    assert len(pairs) > 30
    for asked, gone in pairs:
        assert gone["gone"] == asked["asked"]
        assert gone["priority_after"] == 0
    numbers = played["runs"][policy]["numbers"]
    assert numbers["faults"] == {}
    assert numbers["answers"]["mismatch"] == numbers["answers"]["nan"] == 0
    assert numbers["answers"]["answered"] > numbers["answers"]["timeout"]
    assert 0 < numbers["decision_us"]["p50"] <= numbers["decision_us"]["p99"]


def test_what_goes_wrong_in_our_code_stays_there(played):
    some, every = played["broken"]
    for run in (some, every):
        assert run["tokens"] == played["quiet"][: len(run["tokens"])]
        gone = [event for event in run["log"] if "gone" in event]
        assert len(gone) > 5 and all(event["priority_after"] == 0 for event in gone)
    asked = [(a, b) for a, b in itertools.pairwise(some["log"]) if "asked" in a]
    assert asked and all(gone["gone"] == who["asked"] for who, gone in asked)
    assert set(some["faults"]) == {"preempt: OverflowError"}
    places = ("arrive", "schedule", "choose", "preempt", "order", "finish")
    assert set(every["faults"]) == {f"{place}: OverflowError" for place in places}
    assert not any("asked" in event for event in every["log"])
    assert every["faults"]["arrive: OverflowError"] == every["faults"]["finish: OverflowError"] == 30


def test_the_largest_goes_where_that_is_the_rule(played):
    asked = [e for e in played["runs"]["victim_largest"]["log"] if "asked" in e and not e["fell_back"]]
    assert len(asked) > 20
    assert all(e["held"][e["asked"]] == max(e["held"].values()) for e in asked)


def test_the_bundle_has_an_opinion_of_its_own(played):
    asked = [event for event in played["runs"]["bundle"]["log"] if "asked" in event]
    assert sum(event["asked"] != event["own"] for event in asked) > len(asked) / 4
    assert any(event["held"][event["asked"]] != max(event["held"].values()) for event in asked)


def test_the_cap_cuts_prompts_and_leaves_the_tokens(played):
    capped = played["capped"]
    assert capped["tokens"] == played["quiet"][: len(capped["tokens"])]
    assert capped["asked"] > 0
    before = [prompts for prompts, cap in capped["steps"] if cap == 1024]
    after = [prompts for prompts, cap in capped["steps"] if cap == 64]
    assert len(before) + len(after) == len(capped["steps"])
    assert max(before) > 64
    assert max(after) == 64
