"""Rounds in random order, a forgotten warm-up, no garbage collection; a neighbour does not fail unseen."""

import gc
import time
from itertools import pairwise
from threading import Barrier, Event

import numpy as np
import pytest

from servegym.runtime.calibrate.measure import beside, measure, measure_together, typical
from servegym.runtime.calibrate.shapes import Shape

SHAPES = [Shape((n,)) for n in range(1, 21)]


class Recorder:
    """Remembers what ran; a shape takes its context in seconds, plus a drift of 1 s a call."""

    def __init__(self, drift=0.0):
        self.ran, self.drift, self.collecting = [], drift, []

    def run(self, shape):
        self.ran.append(shape)
        self.collecting.append(gc.isenabled())
        return shape.contexts[0] + self.drift * len(self.ran)


def test_each_round_has_every_shape_once_in_an_order_of_its_own():
    bench = Recorder()
    seconds = measure(bench, SHAPES, rounds=3, seed=5)
    rounds = [bench.ran[k * 20 : (k + 1) * 20] for k in range(4)]
    assert len(bench.ran) == 80
    assert all(set(one) == set(SHAPES) for one in rounds)
    assert all(one != SHAPES for one in rounds)
    assert all(a != b for a, b in pairwise(rounds))
    np.testing.assert_array_equal(seconds, np.repeat(np.arange(1.0, 21.0)[:, None], 3, axis=1))


def test_no_round_is_forgotten_where_there_is_nothing_to_warm_up():
    bench = Recorder()
    assert measure(bench, SHAPES, rounds=2, warm_up=0).shape == (20, 2)
    assert len(bench.ran) == 40


def test_drift_does_not_look_like_a_shape():
    seconds = typical(measure(Recorder(drift=0.05), SHAPES, rounds=9, seed=0))
    extra = seconds - np.arange(1.0, 21.0)
    assert abs(np.corrcoef(extra, np.arange(20))[0, 1]) < 0.5


def test_warm_up_is_forgotten():
    class Cold(Recorder):
        def run(self, shape):
            return super().run(shape) + 100 * (len(self.ran) <= len(SHAPES))

    assert measure(Cold(), SHAPES, rounds=2).max() <= 20


def test_garbage_is_not_collected_meanwhile():
    bench = Recorder()
    measure(bench, SHAPES, rounds=1)
    assert not any(bench.collecting)
    assert gc.isenabled()


def test_the_median_ignores_an_interruption():
    assert typical(np.array([[1.0, 1.1, 50.0]])).tolist() == [1.1]


def test_neighbours_run_while_the_block_lasts_and_no_longer():
    ready = Event()

    class Neighbour(Recorder):
        def run(self, shape):
            ready.set()
            return super().run(shape)

    neighbour = Neighbour()
    with beside([neighbour], SHAPES):
        assert ready.wait(5)
    ran = len(neighbour.ran)
    assert ran > 0
    assert not Event().wait(0.01)
    assert len(neighbour.ran) == ran


def test_a_neighbour_that_fails_is_reported():
    class Broken:
        def run(self, shape):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), beside([Broken()], SHAPES):
        pass


def test_benches_are_measured_together_each_in_its_own_number_of_rounds():
    benches = [Recorder(), Recorder()]
    seconds = measure_together(benches, SHAPES, [3, 1], seed=2)
    assert [one.shape for one in seconds] == [(20, 3), (20, 1)]
    for bench, one in zip(benches, seconds, strict=True):
        np.testing.assert_array_equal(one, np.repeat(np.arange(1.0, 21.0)[:, None], one.shape[1], axis=1))
        assert not any(bench.collecting)
    assert benches[0].ran[:20] != benches[1].ran
    assert gc.isenabled()


def test_one_bench_waits_for_no_other_to_end():
    met = Barrier(2, timeout=10)

    class Meeting(Recorder):
        def run(self, shape):
            if len(self.ran) < len(SHAPES):
                met.wait()
            return super().run(shape)

    assert len(measure_together([Meeting(), Meeting()], SHAPES, [1, 1])) == 2


def test_who_is_through_goes_on_until_the_last_one_is():
    class Last(Recorder):
        def run(self, shape):
            end = time.monotonic() + 30.0
            while not self.ran and len(first.ran) < 100 and time.monotonic() < end:  # it has 20 to do
                Event().wait(0.001)
            return super().run(shape)

    first, last = Recorder(), Last()
    seconds = measure_together([first, last], SHAPES, [1, 1])
    assert len(first.ran) >= 100
    assert len(last.ran) == 20
    assert sorted(seconds[0].ravel()) == sorted(seconds[1].ravel()) == list(range(1, 21))


def test_a_bench_that_fails_lets_the_others_end():
    class Broken(Recorder):
        def run(self, shape):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_together([Recorder(), Broken()], SHAPES, [1, 1])
