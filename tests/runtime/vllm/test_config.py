"""What the scheduler is told by --additional-config."""

from __future__ import annotations

import pytest

from servegym.errors import InputError
from servegym.runtime.vllm.config import SchedulerConfig, read_config

GOOD = {"policy": "victim_largest", "profile": "a100-llama-3.1-8b"}


def test_what_is_left_out_has_a_default(tmp_path):
    assert read_config({"servegym": GOOD, "other": 1}) == SchedulerConfig(**GOOD)
    full = {
        **GOOD,
        "budget_us": 90,
        "order": "shortest",
        "prefill_period_s": 0,
        "report": str(tmp_path / "report.json"),
    }
    assert read_config({"servegym": full}) == SchedulerConfig(
        **{**full, "budget_us": 90.0, "prefill_period_s": 0.0}
    )


@pytest.mark.parametrize(
    ("additional", "field"),
    [
        (None, "servegym"),
        ({}, "servegym"),
        ({"servegym": []}, "servegym"),
        ({"servegym": {}}, "policy"),
        ({"servegym": {**GOOD, "policy": ""}}, "policy"),
        ({"servegym": {**GOOD, "profile": 5}}, "profile"),
        ({"servegym": {**GOOD, "speed": 1}}, "speed"),
        ({"servegym": {**GOOD, "order": "longest"}}, "order"),
        ({"servegym": {**GOOD, "budget_us": 0}}, "budget_us"),
        ({"servegym": {**GOOD, "budget_us": True}}, "budget_us"),
        ({"servegym": {**GOOD, "budget_us": float("nan")}}, "budget_us"),
        ({"servegym": {**GOOD, "prefill_period_s": -1}}, "prefill_period_s"),
        ({"servegym": {**GOOD, "prefill_period_s": "0.5"}}, "prefill_period_s"),
        ({"servegym": {**GOOD, "report": "/nowhere/report.json"}}, "report"),
    ],
)
def test_what_cannot_work_is_refused(additional, field):
    with pytest.raises(InputError) as error:
        read_config(additional)
    assert error.value.field == field
