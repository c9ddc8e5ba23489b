import re

import pytest

from servegym.envs.workloads import GENERATORS, catalogue, generate, resolve
from servegym.errors import InputError


def test_every_generator_and_its_source_are_listed():
    rows = catalogue()
    listed = {re.split(r"\[?:", row.name)[0] for row in rows if row.kind == "generator"}
    assert listed == set(GENERATORS)
    assert all(row.about and row.source and row.license and row.get for row in rows)
    assert all(row.source.startswith("https://") for row in rows if row.kind == "trace")


def test_a_name_or_a_path(tmp_path):
    assert len(resolve("fixed:8-8", requests=3)) == 3
    assert len(resolve(requests=5, seed=3)) == 5
    assert (resolve(requests=5).prompt_tokens == generate("azure2023_conv", 5).prompt_tokens).all()
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n")
    assert len(resolve(str(path))) == 1


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("nothing", "azure2023_conv, .*llumnix:IN-OUT"),
        ("no/such.csv", "no such file"),
        ("x.jsonl", "no such file"),
    ],
)
def test_unknown_names_list_what_is_there(spec, hint):
    with pytest.raises(InputError, match=hint):
        resolve(spec)
