"""Threads get cores of their own where there are enough; garbage and the interpreter's turns are put back."""

import gc
import os
import sys
from threading import Thread

import pytest

from servegym.runtime.steady import take_core, undisturbed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which cores a thread has")


def cores_after(number, threads):
    found = []

    def work():
        take_core(number, threads)
        found.append(os.sched_getaffinity(0))

    thread = Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_each_thread_has_a_core_of_its_own_and_the_others_keep_all():
    mine = os.sched_getaffinity(0)
    taken = [cores_after(k, len(mine)) for k in range(len(mine))]
    assert all(len(cores) == 1 for cores in taken)
    assert set.union(*taken) == mine == os.sched_getaffinity(0)


def test_with_more_threads_than_cores_none_is_bound():
    mine = os.sched_getaffinity(0)
    assert cores_after(0, len(mine) + 1) == mine


def test_garbage_and_turns_are_as_before_even_after_an_error():
    interval = sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError), undisturbed():
        assert not gc.isenabled() and sys.getswitchinterval() < interval
        raise ZeroDivisionError
    assert gc.isenabled() and sys.getswitchinterval() == interval
