"""Faults of our own inside vLLM stay there."""

from __future__ import annotations

import logging

import pytest

from servegym.runtime.vllm.faults import Faults


def test_they_are_contained_counted_and_logged_once_a_kind(caplog):
    faults = Faults()
    with caplog.at_level(logging.ERROR, "vllm.servegym"):
        for _ in range(100):
            with faults.contained("choose"):
                raise KeyError("x")
            with faults.contained("choose"):
                raise OverflowError("math range error")
            with faults.contained("arrive"):
                raise KeyError("x")
            with faults.contained("finish"):
                pass
    assert faults.counts == dict.fromkeys(
        ("choose: KeyError", "choose: OverflowError", "arrive: KeyError"), 100
    )
    assert len(caplog.records) == 3
    assert "a fault in choose" in caplog.text and "OverflowError: math range error" in caplog.text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_process_is_obeyed(stop):
    faults = Faults()
    with pytest.raises(stop), faults.contained("choose"):
        raise stop
    assert not faults.counts
