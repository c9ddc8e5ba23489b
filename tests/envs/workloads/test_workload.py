import numpy as np
import pytest

from servegym.envs.workloads import make_workload
from servegym.errors import InputError

GOOD = {"arrived_at_s": [0.0, 1.0, 2.0], "prompt_tokens": [40, 50, 60], "output_tokens": [1, 2, 3]}


def blocks(offsets, ids):
    return {"prefix_offsets": offsets, "prefix_ids": ids, "prefix_block_tokens": 16}


def test_unknown_columns_are_filled():
    w = make_workload("w", **GOOD, after=np.array([-1, 0, -1]), gap_s=np.array([0, 1.5, 0]))
    assert len(w) == 3 and w.rate_rps == 1.5 and w.max_output_tokens == 3
    assert w.prompt_tokens.dtype == np.int32 and w.priority.dtype == np.int16
    assert w.session.tolist() == [-1] * 3 and w.prefix_offsets.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"arrived_at_s": [0, np.nan, 1]}, "arrived_at_s, row 1"),
        ({"arrived_at_s": [0, -1, 1]}, "arrived_at_s, row 1"),
        ({"arrived_at_s": [1, 0, 1]}, "arrived_at_s, row 1"),
        ({"arrived_at_s": [1, 2, 9e9]}, "arrived_at_s, row 2"),
        ({"prompt_tokens": [0, 1, 1]}, "prompt_tokens, row 0"),
        ({"prompt_tokens": [1, 1.5, 1]}, "prompt_tokens, row 1"),
        ({"output_tokens": [1, 1, 2_000_001]}, "output_tokens, row 2"),
        ({"output_tokens": [1, 1]}, "output_tokens"),
        ({"arrived_at_s": [], "prompt_tokens": [], "output_tokens": []}, "rows"),
        ({"priority": [1, 2, 40_000]}, "priority, row 2"),
        ({"class_id": [0, 0, 1]}, "class_id, row 2"),
        ({"gap_s": [0, np.inf, 0]}, "gap_s, row 1"),
        ({"after": [0, -1, -1]}, "after, row 0"),
        ({"after": [-1, 0, 0]}, "after, row 2"),
        ({"after": [-2, 0, 0]}, "after, row 0"),
        (blocks([0, 1, 1], [0]), "prefix_offsets"),
        (blocks([0, 2, 1, 2], [0, 1]), "prefix_offsets"),
        ({"prefix_offsets": [0, 1, 1, 1], "prefix_ids": [0]}, "prefix_block_tokens"),
        (blocks([0, 2, 2, 3], [0, 1, -7]), "prefix_ids, row 2"),
        (blocks([0, 0, 0, 4], [0, 1, 2, 3]), "prefix_ids, row 2"),
    ],
)
def test_every_broken_rule_is_named(change, field):
    arrays = {k: v if k == "prefix_block_tokens" else np.array(v) for k, v in (GOOD | change).items()}
    with pytest.raises(InputError) as error:
        make_workload("w", **arrays)
    assert error.value.field == field
