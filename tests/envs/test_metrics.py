import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.envs.metrics import METRICS, class_slos, interval, met_slo, paired_difference, summarize
from servegym.envs.records import Records
from servegym.envs.scenario import Slo

NAN = math.nan


def four_requests() -> Records:
    """Worked by hand: one good, one late first token, one slow stream, one unfinished of class 1."""
    return Records(
        arrived_s=np.array([0.0, 1.0, 2.0, 3.0]),
        dispatched_s=np.array([0.0, 1.0, 2.0, NAN]),
        first_token_s=np.array([0.5, 3.0, 2.5, NAN]),
        finished_s=np.array([1.5, 3.0, 10.0, NAN]),
        max_gap_s=np.array([0.2, 0.0, 1.0, 0.0]),
        prompt_tokens=np.array([100, 200, 300, 400], np.int32),
        output_tokens=np.array([11, 1, 6, 5], np.int32),
        cached_tokens=np.array([50, 0, 50, 0], np.int32),
        lost_tokens=np.array([0, 0, 40, 0], np.int64),
        preemptions=np.array([0, 0, 2, 0], np.int32),
        migrations=np.zeros(4, np.int32),
        instance=np.array([0, 0, 1, -1], np.int32),
        class_id=np.array([0, 0, 0, 1], np.int16),
        priority=np.zeros(4, np.int16),
    )


SLO = [Slo(ttft_s=1.0, tpot_s=0.2, weight=1.0), Slo(ttft_s=1.0, tpot_s=0.2, weight=3.0)]


def test_hand_computed_episode():
    m = summarize(four_requests(), SLO)
    assert m["requests"] == 4
    assert m["unfinished"] == 1
    # TTFT 0.5, 2.0, 0.5; TPOT 0.1 and 1.5 (the one-token answer has none); E2E 1.5, 2, 8
    assert m["ttft_mean_s"] == pytest.approx(1.0)
    assert m["ttft_p50_s"] == pytest.approx(0.5)
    assert m["ttft_p99_s"] == pytest.approx(0.5 + 0.98 * 1.5)
    assert m["tpot_mean_s"] == pytest.approx(0.8)
    assert m["tpot_p99_s"] == pytest.approx(0.1 + 0.99 * 1.4)
    assert m["e2e_mean_s"] == pytest.approx(11.5 / 3)
    assert m["e2e_p50_s"] == pytest.approx(2.0)
    assert m["goodput"] == pytest.approx(1 / 6)  # weights 1, 1, 1, 3
    # first arrival 0, last finish 10
    assert m["goodput_rps"] == pytest.approx(0.1)
    assert m["throughput_rps"] == pytest.approx(0.3)
    assert m["throughput_tokens_per_s"] == pytest.approx(1.8)
    assert m["preemptions"] == pytest.approx(0.5)
    assert m["lost_tokens"] == pytest.approx(10)
    assert m["cache_hits"] == pytest.approx(0.1)


def test_weights_of_classes_change_goodput_and_not_its_rate():
    heavy = [replace(SLO[0], weight=3.0), SLO[1]]
    m = summarize(four_requests(), heavy)
    assert m["goodput"] == pytest.approx(3 / 12)  # weights 3, 3, 3, 3
    assert m["goodput_rps"] == pytest.approx(0.1)


def test_every_metric_is_documented_and_delivered():
    assert list(summarize(four_requests(), SLO)) == [m.name for m in METRICS]
    assert all(m.doc and m.unit for m in METRICS)


def test_slo_bounds_are_inclusive_and_unfinished_is_a_miss():
    records = four_requests()
    np.testing.assert_array_equal(met_slo(records, SLO), [True, False, False, False])
    exact = [Slo(ttft_s=0.5, tpot_s=0.1), Slo()]
    assert met_slo(records, exact)[0]
    # a first token in time does not save a request that never finished
    stuck = replace(records, first_token_s=np.array([0.5, 3.0, 2.5, 3.1]))
    assert not met_slo(stuck, SLO)[3]


def test_nothing_finished_gives_nan_latencies_and_no_goodput():
    records = four_requests()
    nothing = replace(records, first_token_s=np.full(4, NAN), finished_s=np.full(4, NAN))
    m = summarize(nothing, SLO)
    assert math.isnan(m["ttft_p99_s"])
    assert m["goodput"] == 0
    assert m["unfinished"] == 4


def test_class_slos_follow_names():
    special = Slo(ttft_s=9.0)
    assert class_slos(("a", "b"), Slo(), {"b": special}) == [Slo(), special]


def test_interval_matches_the_textbook():
    # 1..5: mean 3, s = sqrt(2.5), t(0.975, 4) = 2.7764
    result = interval([1, 2, 3, 4, 5])
    assert result.mean == 3
    assert result.half_width == pytest.approx(2.7764451 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(interval([2.0]).half_width)
    assert interval([2.0, NAN]).mean == 2.0
    assert math.isnan(interval([NAN]).mean)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(-10, 10))
def test_pairing_cancels_what_seeds_share(reference, gain):
    result = paired_difference(np.array(reference) + gain, reference)
    assert result.mean == pytest.approx(gain, abs=1e-9)
    assert result.half_width == pytest.approx(0, abs=1e-9)


def test_pairing_refuses_unequal_samples():
    with pytest.raises(ValueError, match="3 and 2 seeds"):
        paired_difference([1, 2, 3], [1, 2])


@given(st.permutations(range(4)))
def test_order_of_rows_does_not_matter(order):
    records = four_requests()
    shuffled = Records(**{f.name: getattr(records, f.name)[list(order)] for f in fields(Records)})
    assert summarize(shuffled, SLO) == pytest.approx(summarize(records, SLO))
