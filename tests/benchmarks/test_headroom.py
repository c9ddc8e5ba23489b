"""The headroom benchmark: which rules stand behind look-ahead, and a row of its table."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def headroom(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import headroom

    return headroom


def test_only_rules_of_the_model_play_behind_an_answer(headroom):
    assert headroom.built_in("mooncake") == {"dispatch": "mooncake"}
    joined = headroom.built_in("lmetric+llumnix+victim_cost_aware+budget_tpot")
    assert joined == {
        "dispatch": "lmetric",
        "preempt": "cheapest",
        "migrate": "llumnix",
        "move": "shortest",
        "budget": "tpot",
    }
    for outside in ("random", "dynamo", "round_robin"):
        assert headroom.built_in(outside) is None


def test_a_row_compares_the_best_heuristic_with_look_ahead(headroom, monkeypatch):
    monkeypatch.setattr(headroom, "REQUESTS", 96)
    monkeypatch.setattr(headroom, "HORIZON", 4)
    row = headroom.headroom("mixed")
    assert row["goodput"] >= max(row["random"], row["round_robin"])
    assert row["gains"]["goodput"] == pytest.approx(row["look_goodput"] / row["goodput"] - 1)
    assert row["headroom"] == max(row["gains"].values())
    assert set(row["gains"]) == {"goodput", "ttft_p99_s", "tpot_p99_s"}
