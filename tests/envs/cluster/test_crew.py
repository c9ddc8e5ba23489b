"""Threads that share work: every share once, errors reach the caller, the crew goes on after them."""

import threading

import pytest

from servegym.envs.cluster.crew import Crew


def test_every_share_is_worked_once_each_time():
    done = []
    crew = Crew([(0, 2), (2, 5), (5, 6)])
    for k in range(100):
        crew.run(lambda k, first, last: done.append((k, first, last)), k)
    assert sorted(done) == [(k, *share) for k in range(100) for share in ((0, 2), (2, 5), (5, 6))]
    crew.close()


def test_shares_run_at_the_same_time():
    barrier = threading.Barrier(2, timeout=10)
    crew = Crew([(0,), (1,)])
    crew.run(lambda _: barrier.wait())  # passes only if both are there
    crew.close()


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_reaches_the_caller_and_the_crew_goes_on(bad):
    crew = Crew([(0,), (1,)])

    def fail(share):
        if share == bad:
            raise ValueError(f"share {share}")

    with pytest.raises(ValueError, match=f"share {bad}"):
        crew.run(fail)
    done = []
    crew.run(done.append)
    assert sorted(done) == [0, 1]
    crew.close()
