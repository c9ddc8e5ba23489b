"""Indices of kernels: they count from the start, and so everything else works as without the pass."""

import numba
import numpy as np
import pytest

from servegym.envs.cluster.indexing import Compiler

RECORD = np.dtype([("count", "i8"), ("share", "f8")], align=True)
LAST = 2


def _walk(numbers, records, places, i):
    records[i, i].count += 1
    row, part = numbers[i, LAST], numbers[i, 1:, :2]
    total = records[i, i].count + 0.0
    for k in range(len(places)):
        total += row[places[k]] + numbers[i, places[k], 1]
        part[0, i] = total
    numbers[i][LAST, 1:] = total
    return total


def test_indices_find_what_they_find_in_python():
    compiled = numba.njit(_nrt=False, error_model="numpy", pipeline_class=Compiler)(_walk)
    found = []
    for play in (_walk, compiled):
        numbers, records = np.arange(24.0).reshape(2, 3, 4), np.zeros((2, 2), RECORD).view(np.recarray)
        found.append((play(numbers, records, np.array([2, 0, 1], np.int32), 1), numbers, records["count"]))
    for python, kernel in zip(*found, strict=True):
        np.testing.assert_array_equal(python, kernel)


@pytest.mark.parametrize("place", ["first", "last", "alone"])
def test_a_negative_index_is_outside(place):
    """Numba would take -1 for the last place; a check of bounds now finds what would read elsewhere."""

    def read(numbers, k):
        if place == "alone":
            return numbers[0][k]
        return numbers[k, 0] if place == "first" else numbers[0, k]

    compiled = numba.njit(boundscheck=True, pipeline_class=Compiler)(read)
    numbers = np.ones((2, 2))
    assert compiled(numbers, 1) == 1.0
    with pytest.raises(IndexError):
        compiled(numbers, -1)
