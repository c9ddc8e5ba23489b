"""The profile contract: round trip, every bad field, and the tables that come out."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.envs.costs import cost_tables, load_profile, profile_names, save_profile
from servegym.envs.costs.model import iteration_ps, prefill_ps, stretch_ps
from servegym.envs.costs.profile import Curve, Geometry
from servegym.envs.costs.reference import ReferenceCosts
from servegym.errors import InputError

EXPECTED = {
    "a10-llama-7b",
    "a100-llama-3.1-8b",
    "h100-llama-3.1-8b",
    "h200-llama-3.1-8b",
    "l40s-llama-3.1-8b",
    "h100-llama-3.1-70b-tp4",
    "h200-llama-3.1-70b-tp4",
    "rtx4090-llama-3.1-8b",
    "rtxpro6000-llama-3.1-8b",
}
TP4 = "h100-llama-3.1-70b-tp4"
MIXED = "rtx4090-llama-3.1-8b"


@pytest.fixture
def document(tmp_path):
    """The JSON of a shipped profile with every optional section, and a function that writes and loads it."""
    path = tmp_path / "edited.json"
    data = json.loads(Path(shipped_path(MIXED)).read_text())

    def load(edited):
        path.write_text(json.dumps(edited))
        return load_profile(path)

    return data, load


def shipped_path(name):
    from servegym.envs.costs.profile import SHIPPED

    return SHIPPED / f"{name}.json"


def test_the_shipped_profiles_are_there_small_and_named_as_their_files():
    assert set(profile_names()) == EXPECTED
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert shipped_path(name).stat().st_size < 60_000
        assert profile.provenance.held_out, name
        assert all(error.shapes > 0 for error in profile.provenance.held_out.values()), name


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_round_trip(name, tmp_path):
    profile = load_profile(name)
    save_profile(profile, tmp_path / "copy.json")
    assert load_profile(tmp_path / "copy.json") == profile
    assert list(tmp_path.iterdir()) == [tmp_path / "copy.json"]


def test_llama_geometry_by_hand():
    model = load_profile("h100-llama-3.1-8b").model
    assert model.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2 == 131_072
    assert load_profile("a10-llama-7b").model.kv_bytes_per_token == 524_288  # 0.524 MB, as Llumnix gives
    assert isinstance(model, Geometry)


def set_at(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["name"], "", "name"),
        (["model", "layers"], 0, "model.layers"),
        (["model", "layers"], 2.5, "model.layers"),
        (["model", "kv_heads"], 64, "model.kv_heads"),
        (["model", "extra"], 1, "model.extra"),
        (["device", "memory_bytes"], -1, "device.memory_bytes"),
        (["device"], [], "device"),
        (["tensor_parallel"], True, "tensor_parallel"),
        (["kv_blocks"], 0, "kv_blocks"),
        (["block_tokens"], "16", "block_tokens"),
        (["token_budget"], 8, "token_budget"),
        (["max_seqs"], None, "max_seqs"),
        (["overhead_us"], float("nan"), "overhead_us"),
        (["linear", "at", 1], 0, "linear.at[1]"),
        (["linear", "us", 0], -1.0, "linear.us[0]"),
        (["linear", "us"], [1.0], "linear.us"),
        (["linear", "at"], [], "linear.at"),
        (["head", "us", 3], float("inf"), "head.us[3]"),
        (["head", "at", 0], -4, "head.at"),
        (["prefill_attention", "rows", 0], 3, "prefill_attention.rows"),
        (["prefill_attention", "us", 1], [0.0], "prefill_attention.us[1]"),
        (["decode_attention", "columns", 1], -5, "decode_attention.columns[1]"),
        (["decode_attention", "us"], [], "decode_attention.us"),
        (["decode_skew", "us", 0], "fast", "decode_skew.us[0]"),
        (["mixed_attention", "columns", 1], 66, "mixed_attention.columns"),
        (["mixed_launch_us"], -0.1, "mixed_launch_us"),
        (["chunked_us"], -0.1, "chunked_us"),
        (["swap", "bytes_per_second"], 0, "swap.bytes_per_second"),
        (["swap", "overlap"], 1.5, "swap.overlap"),
        (["network", "seconds_per_call"], -1, "network.seconds_per_call"),
        (["start", "compile_s"], -1, "start.compile_s"),
        (["provenance", "source"], None, "provenance.source"),
        (["provenance", "held_out", "head", "shapes"], -1, "provenance.held_out.head.shapes"),
        (["provenance", "notes"], "none", "provenance.notes"),
        (["schema"], 99, "schema"),
    ],
)
def test_a_bad_field_is_named(document, path, value, field):
    data, load = document
    edited = copy.deepcopy(data)
    set_at(edited, path, value)
    with pytest.raises(InputError) as caught:
        load(edited)
    assert caught.value.field == field
    assert "edited.json" in caught.value.where
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field", ["name", "model", "device", "linear", "head", "decode_attention", "kv_blocks"]
)
def test_a_missing_field_is_named(document, field):
    data, load = document
    with pytest.raises(InputError) as caught:
        load({key: value for key, value in data.items() if key != field})
    assert (caught.value.field, caught.value.hint) == (field, "missing")


def test_a_profile_that_does_not_name_it_takes_nothing_more_for_chunks(document):
    data, load = document
    assert "chunked_us" not in data
    assert load(data).chunked_us == 0
    assert load(data | {"chunked_us": 7000}).chunked_us == 7000


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\udcff"])
def test_text_that_is_no_profile(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError):
        load_profile(path)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"h100-llama-3\.1-8b"):
        load_profile("h100")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_profile(tmp_path / "nowhere.json")


def test_a_curve_by_hand():
    curve = Curve((2, 4, 8), (10.0, 20.0, 60.0))
    assert curve(np.array([0, 2, 3, 6, 10])).tolist() == [10.0, 10.0, 15.0, 40.0, 80.0]


@pytest.mark.parametrize(("tokens", "sequences", "field"), [(0, 8, "max_tokens"), (8, 0, "max_sequences")])
def test_table_bounds(tokens, sequences, field):
    with pytest.raises(InputError) as caught:
        cost_tables([load_profile(MIXED)], tokens, sequences)
    assert caught.value.field == field


def test_no_profile_no_tables():
    with pytest.raises(InputError):
        cost_tables([], 8, 8)


@pytest.fixture(scope="module")
def tables():
    return cost_tables([load_profile(name) for name in sorted(EXPECTED)], 4096, 256)


def test_tables_are_monotone(tables):
    for name in ("linear", "head"):
        assert (np.diff(getattr(tables, name), axis=1) >= 0).all(), name
    for name in ("decode_base", "mixed_base"):
        assert (np.diff(getattr(tables, name), axis=2) >= 0).all(), name
    for p, name in enumerate(sorted(EXPECTED)):  # as far as the profile's own knots go
        surface = load_profile(name).prefill_attention
        prefill = tables.prefill[p, : len(surface.rows), : len(surface.columns)]
        assert all((np.diff(prefill, axis=axis) >= 0).all() for axis in (0, 1)), name
    for name in ("decode_slope", "mixed_slope", "decode_skew", "mixed_skew", "mixed_launch", "chunked"):
        assert (getattr(tables, name) >= 0).all(), name
    assert all(array.dtype == np.int64 for array in tables)


def test_decode_segments_meet_to_the_bit(tables):
    n = np.maximum(np.arange(257), 1)[None, :, None]
    width = np.diff(tables.decode_knot, axis=1)[:, None, :]
    for kind in ("decode", "mixed"):
        base, slope = getattr(tables, f"{kind}_base"), getattr(tables, f"{kind}_slope")
        assert (base[:, :, 1:] == base[:, :, :-1] + slope[:, :, :-1] * n * width).all()


def test_a_profile_costs_the_same_alone_and_among_others(tables):
    for p, name in enumerate(sorted(EXPECTED)):
        alone = cost_tables([load_profile(name)], 4096, 256)
        for n, mean in ((1, 10), (7, 900), (200, 30_000)):
            shape = (n, n * mean, mean + 5)
            assert stretch_ps(tables, p, *shape, 40) == stretch_ps(alone, 0, *shape, 40)
            for chunk, past in ((1, 0), (700, 333), (4000, 70_000)):
                ours, theirs = prefill_ps(tables, p, chunk, past), prefill_ps(alone, 0, chunk, past)
                assert abs(ours - theirs) <= 2  # a padded knot may round the last picosecond
                one = iteration_ps(tables, p, *shape, n + 90, n + 1, ours, 90)
                assert one == iteration_ps(alone, 0, *shape, n + 90, n + 1, ours, 90)


def test_tables_hold_the_profile_in_picoseconds():
    profile = load_profile(TP4)
    table = cost_tables([profile], 512, 64)
    us = profile.linear(np.array(256)) + profile.collective(np.array(256)) + profile.overhead_us
    assert table.linear[0, 256] == round(float(us) * 1e6)
    j = profile.decode_attention.columns.index(1024)
    row = profile.decode_attention.rows.index(8)
    expected = profile.decode_attention.us[row][j] * 1e6
    assert abs(table.decode_base[0, 8, j] - expected) <= 8 * 1024  # at most half a picosecond a token off


@pytest.mark.parametrize("contexts", [[], [900] * 32])
def test_an_iteration_with_chunks_takes_the_constant_once(contexts):
    plain = load_profile(MIXED)
    eager = replace(plain, chunked_us=7000.5)
    costs, dearer = (ReferenceCosts(cost_tables([profile], 512, 64)) for profile in (plain, eager))
    for chunks in ([(30, 0)], [(30, 0), (30, 64), (30, 0), (7, 5)]):
        more = dearer.iteration_ps(0, contexts, chunks) - costs.iteration_ps(0, contexts, chunks)
        assert more == 7_000_500_000
    assert dearer.iteration_ps(0, [900] * 32, []) == costs.iteration_ps(0, [900] * 32, [])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_more_work_never_costs_less(tables, data):
    reference = ReferenceCosts(tables)
    p = data.draw(st.integers(0, len(EXPECTED) - 1))
    contexts = data.draw(st.lists(st.integers(1, 20_000), min_size=1, max_size=30))
    chunks = data.draw(st.lists(st.tuples(st.integers(1, 900), st.integers(0, 20_000)), max_size=3))
    cost = reference.iteration_ps(p, contexts, chunks)
    assert cost > 0
    longer = [context + 16 for context in contexts]
    assert reference.iteration_ps(p, longer, chunks) >= cost
    if chunks:
        (chunk, past), *rest = chunks
        assert reference.iteration_ps(p, contexts, [(chunk + 50, past), *rest]) >= cost
        assert reference.iteration_ps(p, contexts, [(chunk, past + 500), *rest]) >= cost
