"""Lengths and service levels that clients tell, or not."""

from __future__ import annotations

import pytest

from servegym.runtime.vllm.hints import MEMORY, OutputLengths, service_level


def test_the_client_knows_best_within_max_tokens():
    lengths = OutputLengths()
    assert lengths.predict({"predicted_tokens": 30}, 100) == 30
    assert lengths.predict({"predicted_tokens": 300}, 100) == 100
    assert lengths.predict({"predicted_tokens": 0.5}, None) == 1


@pytest.mark.parametrize("nonsense", [None, "30", True, 0, -5, float("nan"), float("inf"), [30], 1e9])
def test_nonsense_counts_as_silence(nonsense):
    assert OutputLengths().predict({"predicted_tokens": nonsense}, 7) == 7
    assert service_level({"slo_ttft_s": nonsense, "weight": 2}) == {"weight": 2.0}


def test_answers_teach():
    lengths = OutputLengths()
    assert lengths.predict({}, None) == MEMORY
    lengths.add(40)
    assert lengths.predict({}, None) == 40 and lengths.predict({}, 9) == 9
    for _ in range(20 * MEMORY):
        lengths.add(400)
    assert lengths.predict({}, None) in (399, 400)
