import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servegym.envs.workloads import load, scale_rate
from servegym.errors import InputError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:17:03.9799600,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
"""
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5000005,17,3,ChatGPT,472,18,490,Conversation log
5000045,,4,GPT-4,1087,230,1317,API log
5000118,,2,GPT-4,0,0,0,API log
5000230,17,5,ChatGPT,600,276,876,Conversation log
"""


def mooncake(**changes):
    """Three requests: the second continues the first, the third shares only the system prompt."""
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 450, "hash_ids": [7, 8, 9]},
        {"timestamp": 27000, "input_length": 1600, "output_length": 10, "hash_ids": [7, 8, 21, 22]},
        {"timestamp": 30000, "input_length": 600, "output_length": 3, "hash_ids": [7, 30]},
    ]
    rows[1] |= changes
    return "\n".join(json.dumps(row) for row in rows)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def parquet(tmp_path, metadata=None, **columns):
    known = {"arrived_at_s": [0.0, 1.0, 2.5], "prompt_tokens": [10, 20, 30], "output_tokens": [1, 2, 3]}
    table = pa.table({k: v for k, v in (known | columns).items() if v is not None})
    path = tmp_path / "trace.parquet"
    pq.write_table(table.replace_schema_metadata(metadata or {}), path)
    return path


def ids(w, row):
    return w.prefix_ids[w.prefix_offsets[row] : w.prefix_offsets[row + 1]].tolist()


def test_azure_as_published(tmp_path):
    w = load(write(tmp_path, "conv.csv", AZURE))
    np.testing.assert_allclose(w.arrived_at_s, [0, 4.314579, 77.29937])
    assert w.prompt_tokens.tolist() == [374, 396, 879] and w.output_tokens.tolist() == [44, 109, 55]
    w = load(write(tmp_path, "conv24.csv", AZURE_2024))
    np.testing.assert_allclose(w.arrived_at_s, [0, 0.007405])


def test_burstgpt_as_published(tmp_path):
    path = write(tmp_path, "burst.csv", BURSTGPT)
    with pytest.raises(InputError, match=r"output_tokens, row 2 = 0.*drop"):
        load(path)
    w = load(path, zero_output="drop")
    assert w.arrived_at_s.tolist() == [0, 40, 225]
    assert [w.class_names[c] for c in w.class_id] == ["Conversation log", "API log", "Conversation log"]
    assert w.session[0] == w.session[2] >= 0 and w.session[1] == -1
    assert w.turn.tolist() == [0, -1, 1]
    assert (w.after == -1).all()


def test_mooncake_as_published(tmp_path):
    w = load(write(tmp_path, "m.jsonl", mooncake()))
    assert (w.arrived_at_s // 3 * 3).tolist() == [0, 27, 30]  # spread inside the 3 s grid
    assert (w.arrived_at_s % 3 > 0).all()
    assert w.turn.tolist() == [0, 1, 0]
    # 1100 + 450 tokens are 3 blocks, and turn 1 begins with all of them; partial last blocks are not named
    assert [ids(w, row) for row in range(3)] == [[0, 1, 2], [0, 1, 2], [0]]
    again = load(tmp_path / "m.jsonl")
    assert np.array_equal(w.arrived_at_s, again.arrived_at_s)


def test_a_turn_that_cuts_the_output_does_not_name_it(tmp_path):
    w = load(write(tmp_path, "m.jsonl", mooncake(input_length=1540)))
    assert ids(w, 0) == [0, 1]


def test_off_the_grid_nothing_is_spread(tmp_path):
    w = load(write(tmp_path, "m.jsonl", mooncake(timestamp=27001)))
    assert w.arrived_at_s.tolist() == [0, 27.001, 30]


def test_window_limit_and_rate(tmp_path):
    path = parquet(tmp_path)
    assert load(path, start_s=1, duration_s=1.5).arrived_at_s.tolist() == [0]
    assert load(path, start_s=1).arrived_at_s.tolist() == [0, 1.5]
    assert len(load(path, limit=2)) == 2
    w = load(path, rate_rps=12.0)
    assert w.rate_rps == pytest.approx(12)
    assert np.array_equal(w.arrived_at_s, scale_rate(load(path), 12.0).arrived_at_s)


def test_priorities_are_read_where_they_are_known(tmp_path):
    assert load(parquet(tmp_path)).priority.tolist() == [0, 0, 0]
    assert load(parquet(tmp_path, priority=[2, None, -1])).priority.tolist() == [2, 0, -1]
    with pytest.raises(InputError, match="priority, row 1"):
        load(parquet(tmp_path, priority=[0, 40000, 0]))
    with pytest.raises(InputError, match="priority, row 2"):
        load(parquet(tmp_path, priority=[0, 0, float("inf")]))


def test_sessions_without_a_clock_are_played_closed_loop(tmp_path):
    path = parquet(
        tmp_path,
        {"time": "session-relative", "block_tokens": "16"},
        arrived_at_s=[0.0, 5.0, 0.0],
        prompt_tokens=[32, 70, 40],
        output_tokens=[20, 5, 5],
        session_id=pa.array([0, 0, 1], pa.int32()),
        turn=pa.array([0, 1, 0], pa.int16()),
        gap_s=pa.array([None, 4.0, None], pa.float32()),
        prefix_hash_ids=[[5, 6], [5, 6, 9, 10], [50, 51]],
        **{"class": ["agent", "agent", "sub"]},
    )
    with pytest.raises(InputError, match="no clock"):
        load(path)
    w = load(path, rate_rps=1e-3)  # the window is long: no session is cut
    late = int(np.flatnonzero(w.after >= 0)[0])
    early = w.after[late]
    assert w.gap_s[late] == 4 and w.session[late] == w.session[early] and w.turn[late] == 1
    assert len(ids(w, early)) == 3 and ids(w, late)[:3] == ids(w, early)  # 32 + 20 tokens, all kept by turn 1
    assert len(set(w.prefix_ids)) == 6 and w.class_names == ("agent", "sub")


def test_a_cut_session_does_not_warm_its_own_past(tmp_path):
    turns = 20
    path = parquet(
        tmp_path,
        {"time": "none", "block_tokens": "16"},
        arrived_at_s=pa.nulls(turns, pa.float64()),
        prompt_tokens=[16] * turns,
        output_tokens=[1] * turns,
        session_id=[3] * turns,
        turn=list(range(turns)),
        gap_s=[1.0] * turns,
        prefix_hash_ids=[[0]] * turns,
    )
    w = load(path, rate_rps=2.0)
    assert len(w) == turns and w.arrived_at_s.max() <= 10
    assert len(np.unique(w.session)) == len(np.unique(w.prefix_ids)) > 1
    for session in np.unique(w.session):
        assert len(np.unique(w.prefix_ids[w.session == session])) == 1


def test_a_turn_that_begins_otherwise_does_not_name_the_output(tmp_path):
    path = parquet(
        tmp_path,
        {"block_tokens": "16"},
        prompt_tokens=[32, 80, 16],
        output_tokens=[20, 5, 1],
        session_id=[4, 4, 5],
        prefix_hash_ids=[[5, 6], [5, 7, 8, 9, 10], [5]],
    )
    w = load(path)
    assert [ids(w, row) for row in range(3)] == [[0, 1], [0, 2, 3, 4, 5], [0]]
    assert w.turn.tolist() == [0, 1, 0]


def test_unknown_gaps_are_drawn(tmp_path):
    n = 400
    path = parquet(
        tmp_path,
        {"time": "none"},
        arrived_at_s=pa.nulls(n, pa.float64()),
        prompt_tokens=[16] * n,
        output_tokens=[1] * n,
        session_id=list(np.repeat(np.arange(n // 4), 4)),
        turn=list(np.tile(np.arange(4), n // 4)),
    )
    w = load(path, rate_rps=0.01)
    assert 80 < np.median(w.gap_s[w.after >= 0]) < 170  # mooncake_conversation: 123 s


@pytest.mark.parametrize(
    ("columns", "field", "value"),
    [
        ({"arrived_at_s": [0.0, float("nan"), 1.0]}, "arrived_at_s, row 1", None),
        ({"arrived_at_s": [0.0, None, 1.0]}, "arrived_at_s, row 1", None),
        ({"arrived_at_s": [0.0, -1.0, 1.0]}, "arrived_at_s, row 1", -1.0),
        ({"arrived_at_s": [0.0, 2.0, 1.0]}, "arrived_at_s, row 2", 1.0),
        ({"arrived_at_s": [0.0, 1.0, 1e12]}, "arrived_at_s, row 2", 1e12),
        ({"prompt_tokens": [10, 0, 30]}, "prompt_tokens, row 1", 0),
        ({"prompt_tokens": [10, -5, 30]}, "prompt_tokens, row 1", -5),
        ({"prompt_tokens": [10, 1.5, 30]}, "prompt_tokens, row 1", 1.5),
        ({"prompt_tokens": [10, 20, 3_000_000]}, "prompt_tokens, row 2", 3_000_000),
        ({"prompt_tokens": ["a", "b", "c"]}, "prompt_tokens, row 0", "a"),
        ({"output_tokens": [1, 0, 3]}, "output_tokens, row 1", 0),
        ({"output_tokens": [1, None, 3]}, "output_tokens, row 1", None),
        ({"gap_s": [0.0, -2.0, 0.0]}, "gap_s, row 1", -2.0),
        ({"session_id": [0, 1.5, 2]}, "session, row 1", 1.5),
        ({"turn": [0, 2**40, 2]}, "turn, row 1", 2**40),
        ({"output_tokens": None}, "columns", "arrived_at_s, prompt_tokens"),
        ({"prefix_hash_ids": [[1], [2], [3]]}, "metadata block_tokens", None),
        ({"prefix_hash_ids": [1, 2, 3]}, "prefix ids", "int64"),
        ({"arrived_at_s": [], "prompt_tokens": [], "output_tokens": []}, "rows", 0),
    ],
)
def test_bad_rows_are_named(tmp_path, columns, field, value):
    path = parquet(tmp_path, **columns)
    with pytest.raises(InputError) as error:
        load(path)
    assert error.value.where == str(path) and error.value.field == field
    assert value is None or error.value.value == value
    assert "\n" not in str(error.value)


def test_rows_are_those_of_the_file(tmp_path):
    """Dropped rows do not shift the numbers in an error."""
    path = parquet(tmp_path, output_tokens=[0, 0, 3], prompt_tokens=[0, 5, -1])
    with pytest.raises(InputError, match="prompt_tokens, row 2 = -1"):
        load(path, zero_output="drop")


def test_a_trace_without_any_output_is_refused(tmp_path):
    with pytest.raises(InputError, match="no request has any output"):
        load(parquet(tmp_path, output_tokens=[0, 0, 0]), zero_output="drop")


@pytest.mark.parametrize(
    ("name", "text", "field"),
    [
        ("t.parquet", "no parquet at all", "contents"),
        ("t.parquet", "", "contents"),
        ("t.csv", "", "contents"),
        ("t.csv", "a,b\n1,2\n", "columns"),
        ("t.csv", AZURE + "2023-11-16 18:18:00\n", "contents"),
        ("t.csv", AZURE.replace("396", "many"), "ContextTokens, row 1"),
        ("t.csv", AZURE.replace("396", ""), "prompt_tokens, row 1"),
        ("t.csv", AZURE.replace("2023-11-16 18:15:50.9951690", "noon"), "TIMESTAMP, row 1"),
        ("t.csv", AZURE.replace("18:17:03", "18:15:00"), "arrived_at_s, row 2"),
        ("t.csv", AZURE.split("\n")[0] + "\n", "rows"),
        ("t.jsonl", "", "rows"),
        ("t.jsonl", '{"timestamp": 1', "row 0"),
        ("t.jsonl", '{"timestamp": 1}', "input_length, row 0"),
        ("t.jsonl", "[1, 2]", "row 0"),
        ("t.jsonl", mooncake(hash_ids=[-4]), "hash_ids, row 1"),
        ("t.jsonl", mooncake(output_length=None), "output_length, row 1"),
        ("t.txt", AZURE, "extension"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, text, field):
    path = write(tmp_path, name, text)
    with pytest.raises(InputError) as error:
        load(path)
    assert error.value.where == str(path) and error.value.field == field
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"start_s": -1.0}, "start_s"),
        ({"start_s": float("nan")}, "start_s"),
        ({"start_s": 100.0}, "window"),
        ({"duration_s": 0.0}, "duration_s"),
        ({"limit": 0}, "limit"),
        ({"rate_rps": -1.0}, "rate_rps"),
        ({"zero_output": "keep"}, "zero_output"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, arguments, field):
    with pytest.raises(InputError) as error:
        load(parquet(tmp_path), **arguments)
    assert error.value.field == field


def test_a_path_must_be_a_file(tmp_path):
    for path, hint in ((tmp_path, "directory"), (tmp_path / "none.csv", "no such file")):
        with pytest.raises(InputError, match=hint):
            load(path)


ROWS = {
    "azure2023_conv": 4155,
    "azure2023_code": 1547,
    "mooncake_conversation": 2560,
    "servegen_general": 72632,
    "servegen_reason": 79483,
    "weka_agentic": 10184 - 3,  # three have no output
    "sharegpt_turns": 13023,
    "sharegpt_8k_llama2": 6167,
    "arxiv_summarization": 5649,
}


@pytest.mark.parametrize("name", ROWS)
def test_public_traces_load_whole(name, shared_traces):
    w = load(shared_traces / "eval" / f"{name}.parquet", rate_rps=4.0, zero_output="drop")
    assert len(w) == ROWS[name]
    assert w.rate_rps == pytest.approx(4, rel=0.01)


def test_mooncake_shares_as_published(shared_traces):
    w = load(shared_traces / "eval" / "mooncake_conversation.parquet")
    gaps = np.diff(w.arrived_at_s)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)  # 3.15 on the grid
    seen, hits, asked = set(), 0, 0
    for row in range(len(w)):
        blocks = ids(w, row)[: w.prompt_tokens[row] // 512]
        hits += sum(block in seen for block in blocks)
        asked += -(-int(w.prompt_tokens[row]) // 512)
        seen.update(blocks)
    assert hits / asked == pytest.approx(0.263, abs=0.005)


def test_inferred_sessions_are_those_of_the_release(shared_traces):
    path = shared_traces / "eval" / "mooncake_conversation.parquet"
    table = pq.read_table(path)
    inferred = len(np.unique(table["session_inferred"].to_numpy()))
    w = load(path)
    assert len(np.unique(w.session)) == pytest.approx(inferred, rel=0.005)
