import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import servegym.files
from servegym.agents.ppo import PPO, CheckpointCallback, PPOConfig, checkpoint, load_policy, read_info
from servegym.agents.ppo.resume import optimizer_state, trainer_state
from servegym.agents.task import Task
from servegym.errors import InputError
from servegym.models.config import NetworkConfig
from servegym.models.numpy_policy import forward

TASK = Task("ServeGym/Cluster-v0", ("dispatch", "budget"), {"preempt": "largest"}, ({"name": "chat"},))
CONFIG = PPOConfig(n_steps=16, batch_size=64, n_epochs=2)
TOTAL = 8 * 16 * 6


def train(env, callback=None, total=TOTAL):
    model = PPO(env, NetworkConfig(16, 1), CONFIG, seed=3, task=TASK, command="train")
    return model.learn(total, callback)


@pytest.fixture(scope="module")
def trained(make_env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trained"
    model = train(make_env(8))
    model.save(folder, extra={"README.md": "a card"})
    return model, folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained[1], tmp_path / "copy")


def everything(model):
    """All bits that decide how a run goes on, and all that it has learned."""
    arrays = {name: p.numpy() for name, p in model.network.state_dict().items()}
    arrays |= optimizer_state(model) | trainer_state(model) | model.vector_env.save_state()
    return {name: a.copy() for name, a in arrays.items()}


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(make_env, tmp_path, stop_at):
    class StopAfter(CheckpointCallback):
        """Saves between two updates, then dies."""

        def _save(self):
            super()._save()
            raise InterruptedError

    whole = everything(train(make_env(8)))
    with pytest.raises(InterruptedError):
        train(make_env(8), StopAfter(tmp_path / "c", every=8 * 16 * stop_at))
    info = read_info(tmp_path / "c")
    assert info.steps == 8 * 16 * stop_at
    resumed = everything(PPO.resume(tmp_path / "c", make_env(8)).learn(info.total_steps))
    assert whole.keys() == resumed.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


def test_checkpoint_says_what_it_is(trained):
    info = read_info(trained[1])
    assert (info.network, info.ppo, info.seed, info.steps) == (NetworkConfig(16, 1), CONFIG, 3, TOTAL)
    assert (info.task, info.command) == (TASK, "train")
    assert (
        info.versions["torch"] == torch.__version__.split("+")[0]
        or info.versions["torch"] == torch.__version__
    )
    assert (trained[1] / "README.md").read_text() == "a card"


def test_loaded_policy_answers_like_the_trained_one_and_like_numpy(trained, make_env):
    model, folder = trained
    obs, _ = make_env(50).reset(seed=8)
    policy = load_policy(folder)
    assert policy.name == "trained"
    answers = policy.act(obs)
    np.testing.assert_array_equal(answers, model.predict(obs)[0])
    logits, _ = forward(safetensors.numpy.load_file(folder / "policy.safetensors"), obs)
    np.testing.assert_array_equal(answers, logits.argmax(1))
    assert answers.dtype == np.int64


def test_nothing_is_pickled(trained):
    names = {path.name for path in trained[1].iterdir()}
    tensors = {f"{part}.safetensors" for part in ("policy", "optimizer", "trainer", "env")}
    assert names == tensors | {"config.json", "README.md"}


def test_light_checkpoint_plays_and_refuses_to_resume(trained, make_env, tmp_path):
    trained[0].save(tmp_path / "light", resumable=False)
    load_policy(tmp_path / "light")
    with pytest.raises(InputError, match="cannot be resumed"):
        PPO.resume(tmp_path / "light", make_env(8))


@pytest.mark.parametrize("part", ["policy", "optimizer", "trainer", "env"])
def test_a_flipped_bit_is_refused(folder, make_env, part):
    """The last byte belongs to an array: without the digest it would load."""
    path = folder / f"{part}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert safetensors.numpy.load_file(path)
    with pytest.raises(InputError, match=rf"{part}\.safetensors: sha256"):
        PPO.resume(folder, make_env(8))


def test_files_of_two_checkpoints_do_not_mix(trained, folder, make_env):
    trained[0].save(folder.with_name("other"))
    model = train(make_env(8), total=8 * 16)
    model.save(folder)
    shutil.copy(folder.with_name("other") / "optimizer.safetensors", folder)
    with pytest.raises(InputError, match=r"optimizer\.safetensors: sha256"):
        PPO.resume(folder, make_env(8))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_hash", "0123456789abcdef"),
        ("format", 99),
        ("steps", -1),
        ("steps", "many"),
        ("seed", True),
        ("network", {"hidden": 16}),
        ("network", {"hidden": "wide", "layers": 1}),
        ("network", {"hidden": 32, "layers": 1}),
        ("ppo", {"n_steps": 4}),
        ("task", "chat"),
        ("task", {"env": "ServeGym/Dispatch-v0"}),
        ("task", {"env": "Pong-v5", "decisions": ["dispatch"], "rules": {}, "scenarios": []}),
        ("task", {"env": "ServeGym/Dispatch-v0", "decisions": ["steer"], "rules": {}, "scenarios": []}),
        ("surplus", 1),
    ],
)
def test_refuses_a_tampered_config(folder, field, value):
    edit(folder, **{field: value})
    with pytest.raises(InputError) as error:
        load_policy(folder)
    assert str(folder) in str(error.value)
    assert field in str(error.value) or field == "network"


@pytest.mark.parametrize("name", [f.name for f in checkpoint.fields(checkpoint.CheckpointInfo)])
def test_refuses_a_missing_field(folder, name):
    raw = json.loads((folder / "config.json").read_text())
    del raw[name]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=name):
        load_policy(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "policy.safetensors", "optimizer.safetensors", "trainer.safetensors"]
)
@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "text"])
def test_refuses_damaged_files(folder, make_env, name, damage):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(
            {"empty": b"", "cut": content[: len(content) // 2], "text": b"\xff not this"}[damage]
        )
    with pytest.raises(InputError, match=name):
        PPO.resume(folder, make_env(8))


def test_refuses_weights_that_are_not_finite_or_misshapen(folder):
    path = folder / "policy.safetensors"
    arrays = safetensors.numpy.load_file(path)
    broken = arrays["head_score.weight"].copy()
    broken[0, 0] = np.nan
    for value in (broken, broken[:, :-1], broken.astype(np.float64)):
        safetensors.numpy.save_file(arrays | {"head_score.weight": np.ascontiguousarray(value)}, path)
        edit(folder, sha256={path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
        with pytest.raises(InputError, match=r"head_score\.weight"):
            load_policy(folder)


def test_refuses_to_resume_on_another_number_of_lanes(folder, make_env):
    with pytest.raises(InputError, match=r"trainer\.safetensors: decisions"):
        PPO.resume(folder, make_env(9))


def test_refuses_to_replace_what_is_no_checkpoint(trained, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        trained[0].save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("holder", "name", "calls"),
    [(servegym.files, "save_file", 4), (Path, "write_text", 1), (Path, "replace", 2)],
)
def test_a_crash_while_saving_leaves_a_whole_checkpoint(trained, folder, monkeypatch, holder, name, calls):
    """Die before each call of a function that writes; what stands there afterwards loads."""
    original = getattr(holder, name)
    for survived in range(calls):
        budget = iter(range(survived))

        def dying(*args, budget=budget):
            if next(budget, None) is None:
                raise MemoryError
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(holder, name, lambda *args, **_: dying(*args))
            with pytest.raises(MemoryError):
                trained[0].save(folder)
        load_policy(folder)
    trained[0].save(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_files_have_the_mode_of_any_new_file(trained, tmp_path):
    before = os.umask(0o027)
    try:
        trained[0].save(tmp_path / "checkpoint")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint").iterdir()} == {0o640}


def test_a_checkpoint_of_another_user_is_refused_as_unreadable(folder, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)  # root reads all files, whatever their mode
    with pytest.raises(InputError, match=r"config\.json: .*not readable by this user"):
        load_policy(folder)


def test_policy_refuses_observations_that_are_not_usable(trained, make_env):
    policy = load_policy(trained[1])
    obs, _ = make_env(4).reset(seed=0)
    with pytest.raises(InputError, match="edges"):
        policy.act(obs | {"edges": obs["edges"][..., :-1]})
    with pytest.raises(InputError, match="lane 2"):
        policy.act(obs | {"mask": obs["mask"] * (np.arange(4) != 2)[:, None].astype(np.int8)})
    with pytest.raises(InputError, match="lane 0"):
        policy.act(obs | {"globals": obs["globals"] * np.float32(np.nan)})
