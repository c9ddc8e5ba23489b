import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from servegym.envs.cluster import schema
from servegym.errors import InputError
from servegym.models import numpy_policy
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.runtime.bundle import check_golden, digest_line, load_bundle, read_golden, sha256
from servegym.runtime.export import Origin, export_bundle, resize


def observation(lanes: int, instances: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A well-formed dispatch observation of random numbers, one illegal candidate a lane."""
    rng = np.random.default_rng(seed)
    candidates = np.zeros((lanes, instances + 1, 3), np.int32)
    candidates[:, 1:, 1] = np.arange(instances)
    mask = np.ones((lanes, instances + 1), np.int8)
    mask[:, instances] = 0
    totals = rng.gamma(1.0, 8.0, (lanes, len(schema.GLOBAL))).astype(np.float32)
    totals[:, schema.column(schema.GLOBAL, "instances")] = instances
    return {
        "instances": rng.gamma(1.0, 50.0, (lanes, instances, len(schema.INSTANCE))).astype(np.float32),
        "requests": rng.gamma(1.0, 200.0, (lanes, 1, len(schema.REQUEST))).astype(np.float32),
        "candidates": candidates,
        "edges": rng.gamma(1.0, 1.0, (lanes, instances + 1, len(schema.EDGE))).astype(np.float32),
        "globals": totals,
        "history": rng.poisson(4.0, (lanes, schema.HISTORY)).astype(np.float32),
        "instance_mask": np.ones((lanes, instances), np.int8),
        "mask": mask,
        "kind": np.zeros(lanes, np.int64),
    }


def network() -> DenseNetwork:
    torch.manual_seed(0)
    net = DenseNetwork(NetworkConfig(hidden=8, layers=1))
    with torch.no_grad():  # the initial scores are near uniform; spread them so that answers differ
        net.head_score.weight.mul_(100.0)
    return net


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    origin = Origin(policy="tiny", command="servegym train -n 1", seed=3, fallback="least_request")
    export_bundle(network(), [observation(4, 4), observation(2, 16, 1)], folder, origin)
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.mark.parametrize(("lanes", "instances"), [(1, 1), (1, 16), (5, 3), (2, 64)])
def test_answers_equal_torch_for_any_batch_and_fleet(exported, lanes, instances):
    obs = observation(lanes, instances, seed=7)
    policy = load_bundle(exported)
    with torch.no_grad():
        expected = network()({k: torch.from_numpy(v) for k, v in obs.items()})[0].numpy()
    legal = obs["mask"] != 0
    np.testing.assert_allclose(policy.logits(obs)[legal], expected[legal], rtol=1e-4, atol=1e-4)
    answers = policy.act(obs)
    assert answers.dtype == np.int64
    assert legal[np.arange(lanes), answers].all()


@pytest.mark.filterwarnings("error")
def test_a_number_that_has_no_logarithm_is_read_as_it_is(exported):
    obs = observation(1, 16)
    obs["requests"][..., schema.column(schema.REQUEST, "priority")] = -3.0
    expected, _ = numpy_policy.forward(load_file(exported / "policy.safetensors"), obs)
    found = load_bundle(exported).logits(obs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_manifest_says_what_the_policy_sees_and_where_it_comes_from(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["schema"]["hash"] == schema.schema_hash()
    assert [f["name"] for f in manifest["schema"]["instances"]] == [f.name for f in schema.INSTANCE]
    assert all(
        f["unit"]
        for table in ("instances", "requests", "edges", "globals")
        for f in manifest["schema"][table]
    )
    assert manifest["fallback"] == "least_request"
    assert manifest["training"]["command"] == "servegym train -n 1"
    assert set(manifest["files"]) == {p.name for p in exported.iterdir()} - {
        "manifest.json",
        "manifest.json.sha256",
    }
    assert manifest["decision_us"]["p50"] > 0


def test_golden_answers_are_the_networks(exported):
    groups = read_golden(exported / "golden.safetensors")
    assert [g["instances"].shape[:2] for g in groups] == [(4, 4), (2, 16)]
    for group in groups:
        np.testing.assert_array_equal(group["answers"], group["logits"].argmax(axis=1))


@pytest.mark.parametrize("position", [0, 0.5, 0.999])
def test_a_changed_byte_anywhere_is_refused(bundle, position):
    for file in sorted(bundle.iterdir()):
        data = bytearray(file.read_bytes())
        place = int(position * len(data))
        data[place] ^= 1
        good = file.read_bytes()
        file.write_bytes(bytes(data))
        with pytest.raises(InputError):
            load_bundle(bundle)
        file.write_bytes(good)
    load_bundle(bundle)


def test_a_missing_file_is_refused(bundle):
    for file in sorted(bundle.iterdir()):
        good = file.read_bytes()
        file.unlink()
        with pytest.raises(InputError):
            load_bundle(bundle)
        file.write_bytes(good)


@pytest.mark.parametrize("reader", ["read_bytes", "read_text"])  # the manifest's digest is text
def test_a_file_of_another_user_is_refused_as_unreadable(bundle, monkeypatch, reader):
    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, reader, forbidden)  # root reads all files, whatever their mode
    with pytest.raises(InputError, match="not readable by this user"):
        load_bundle(bundle)


def test_files_have_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        export_bundle(network(), [observation(2, 2)], tmp_path / "bundle", Origin("tiny"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "bundle").iterdir()} == {0o644}


def unlisted(text: str) -> str:
    manifest = json.loads(text)
    del manifest["files"]["policy.onnx"]
    return json.dumps(manifest)


def outside(text: str) -> str:
    manifest = json.loads(text)
    manifest["files"]["../elsewhere"] = "0" * 64
    return json.dumps(manifest)


def renamed(text: str) -> str:
    return json.dumps({**json.loads(text), "policy": None})


def aimless(text: str) -> str:
    return json.dumps({**json.loads(text), "task": {"env": "Pong-v5"}})


def elsewhere(text: str) -> str:
    manifest = json.loads(text)
    manifest["task"]["env"] = "Pong-v5"
    return json.dumps(manifest)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (aimless, "task = .*expected decisions, env, rules, scenarios"),
        (elsewhere, "task.env = 'Pong-v5'"),
        (lambda _: "{}", "format = None"),
        (lambda _: "[]", "JSON = 'list'"),
        (lambda text: text[:-20], "JSON = "),
        (renamed, "policy = None"),
        (unlisted, "files = .*expected policy.onnx"),
        (outside, "files = .*elsewhere"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused_even_with_its_hash(bundle, change, told):
    manifest = bundle / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    (bundle / "manifest.json.sha256").write_text(digest_line(sha256(manifest)))
    with pytest.raises(InputError, match=told):
        load_bundle(bundle)


def test_another_schema_is_refused(bundle, monkeypatch):
    monkeypatch.setattr("servegym.runtime.bundle.schema_hash", lambda: "0123456789abcdef")
    with pytest.raises(InputError, match=r"manifest.json: schema.hash = .*0123456789abcdef"):
        load_bundle(bundle)


def test_export_refuses_a_folder_that_is_no_bundle_and_leaves_it_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="no bundle"):
        export_bundle(network(), [observation(2, 2)], folder, Origin("tiny"))
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_a_disagreeing_runtime_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "servegym.runtime.export.numpy_policy.forward",
        lambda w, obs: (np.full(obs["mask"].shape, np.nan), None),
    )
    with pytest.raises(InputError, match="golden logits"):
        export_bundle(network(), [observation(2, 2)], tmp_path / "bundle", Origin("tiny"))
    assert list(tmp_path.iterdir()) == []


def test_a_new_export_replaces_the_old_bundle(bundle):
    export_bundle(network(), [observation(2, 2)], bundle, Origin("other"))
    assert load_bundle(bundle).name == "other"
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


def test_golden_check_catches_wrong_scores_and_missing_masks():
    golden = {
        "mask": np.array([[1, 1, 0]], np.int8),
        "logits": np.array([[1.0, 2.0, -1e9]], np.float32),
        "answers": np.array([1]),
    }
    check_golden("x", np.array([[1.0, 2.00001, -1e9]], np.float32), golden)
    with pytest.raises(InputError, match="golden logits"):
        check_golden("x", np.array([[2.0, 1.0, -1e9]], np.float32), golden)
    with pytest.raises(InputError, match="golden logits"):
        check_golden("x", np.array([[np.nan, 2.0, -1e9]], np.float32), golden)
    with pytest.raises(
        InputError, match="golden answers"
    ):  # it would send the request to an illegal instance
        check_golden("x", np.array([[1.0, 2.0, 5.0]], np.float32), golden)


def test_resize_keeps_candidates_consistent():
    obs = resize(observation(3, 4), 16)
    assert obs["instances"].shape[:2] == (1, 16)
    np.testing.assert_array_equal(obs["candidates"][0, 1:, 1], np.arange(16))
    np.testing.assert_array_equal(obs["instances"][0, 4], obs["instances"][0, 0])


def test_loading_needs_no_torch(exported):
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from servegym.runtime.bundle import load_bundle\n"
        f"load_bundle({str(exported)!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2], timeout=60)
