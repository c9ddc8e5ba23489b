"""Figures of a report: what cannot be measured is a note, and the rest stands."""

import pytest
import torch

from servegym.errors import InputError
from servegym.runtime.calibrate import figures as room
from servegym.runtime.calibrate.shapes import Limits
from servegym.runtime.engine.instance import Instance


def fails(error):
    def measure(*_):
        raise error

    return measure


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation"),
        RuntimeError("the migration of 256 tokens was given up"),
        MemoryError(),
        InputError("engine", "kv_blocks", 9, "so many do not fit"),
    ],
)
def test_what_fails_is_a_note_of_one_line_and_the_rest_is_measured(error):
    ways = {"one": lambda: {"a": 1.0}, "two": fails(error), "three": lambda: {"b": 2.0}}
    found, notes = room.measured(ways)
    assert found == {"a": 1.0, "b": 2.0}
    (note,) = notes
    assert note.startswith("not measured: two: ") and "\n" not in note
    assert (str(error) or "MemoryError").splitlines()[0] in note


def test_what_is_wrong_in_the_code_is_no_note():
    with pytest.raises(ZeroDivisionError):
        room.measured({"one": lambda: {"a": 1 / 0}})


def test_each_figure_fails_by_itself(tiny, setting, monkeypatch):
    limits = Limits(token_budget=32, max_seqs=8, max_context=320, kv_blocks=120, block_tokens=4)
    instance = Instance(tiny, setting(blocks=120))
    monkeypatch.setattr(room, "memory_bandwidth", lambda _: 1e9)
    names = {"share of the memory bandwidth, %", "downtime of a migration at 256 tokens, ms"}
    found, notes = room.figures(instance, limits)
    assert names <= set(found) and not notes
    monkeypatch.setattr(room, "migration_downtime", fails(RuntimeError("was given up")))
    found, notes = room.figures(instance, limits)
    assert names - set(found) == {"downtime of a migration at 256 tokens, ms"}
    assert notes == ["not measured: downtime of migrations: was given up"]
