"""The design: shapes fit, are told apart by kind, and the held-out ones are new."""

from dataclasses import replace

import pytest

from servegym.errors import InputError
from servegym.runtime.calibrate.shapes import KINDS, Limits, Shape, design

LIMITS = Limits(token_budget=256, max_seqs=16, max_context=512, kv_blocks=300, block_tokens=16)


def test_every_shape_fits_the_engine_and_all_kinds_are_there():
    found = design(LIMITS, size=30, seed=1)
    for part in (found.fitted, found.held_out):
        assert all(LIMITS.fits(shape) for shape in part)
        assert {shape.kind for shape in part} == set(KINDS)


def test_held_out_shapes_are_not_fitted():
    found = design(LIMITS, size=30)
    assert len(found.held_out) > 30
    assert not set(found.fitted) & set(found.held_out)


def test_a_seed_gives_the_same_shapes_and_another_others():
    assert design(LIMITS, seed=3) == design(LIMITS, seed=3)
    assert design(LIMITS, seed=3).held_out != design(LIMITS, seed=4).held_out


def test_half_of_the_mixed_shapes_use_up_the_budget():
    mixed = [shape for shape in design(LIMITS, size=100).fitted if shape.kind == "mixed"]
    full = sum(shape.tokens == LIMITS.token_budget for shape in mixed)
    assert 0.3 < full / len(mixed) < 0.8


def test_prompts_come_in_up_to_eight_chunks_where_there_are_seats():
    found = design(LIMITS, size=60)
    for part in (found.fitted, found.held_out):
        for kind in ("prefill", "mixed"):
            counts = [len(shape.chunks) for shape in part if shape.kind == kind]
            assert 3 < max(counts) <= 8, kind
            assert 1 in counts, kind
    few = design(replace(LIMITS, max_seqs=2), size=60).fitted
    assert {len(shape.chunks) for shape in few if shape.kind == "mixed"} == {1}


def test_axes_cover_the_limits():
    axes = design(LIMITS).axes
    assert (axes.tokens[0], axes.tokens[-1]) == (1, 256)
    assert axes.sequences == (1, 2, 4, 8, 16)
    assert axes.contexts == (0, 32, 64, 128, 256, 512)


def test_a_shape_counts_its_tokens():
    shape = Shape((10, 20), ((7, 0), (3, 9)))
    assert (shape.kind, shape.tokens, shape.sequences, shape.longest) == ("mixed", 12, 4, 7)
    assert (Shape((5,)).kind, Shape(chunks=((5, 0),)).kind) == ("decode", "prefill")


def test_blocks_are_counted_whole():
    tight = Limits(token_budget=64, max_seqs=4, max_context=64, kv_blocks=4, block_tokens=16)
    assert tight.fits(Shape((16, 16, 16, 16)))
    assert not tight.fits(Shape((17, 17, 16)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("token_budget", 1), ("max_seqs", 0), ("max_context", 10), ("kv_blocks", 2), ("token_budget", 16)],
)
def test_impossible_limits_name_the_field(field, value):
    with pytest.raises(InputError) as caught:
        Limits(**{**vars(LIMITS), field: value})
    assert caught.value.field == field
