"""Show that the property tests can fail: break one line of the engine at a time and run them.

    python tests/mutate.py            # every mutation, about a minute each
    python tests/mutate.py 0          # the first only

Each mutation is applied to a copy of the checkout; the run ends with exit code 1 if the tests miss one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("servegym", "envs", "agents", "models", "runtime", "tests/envs/cluster", "pyproject.toml")
TESTS = ("tests/envs/cluster/test_engine.py", "tests/envs/cluster/test_mechanisms.py")
ENGINE, PREFIX, LANE, MEMORY, MIGRATION, PREEMPTION = (
    f"envs/cluster/{name}.py" for name in ("engine", "prefix", "lane", "memory", "migration", "preemption")
)
MUTATIONS = (
    (MEMORY, "        if blocks < 0:\n", "        if blocks < -1:\n", "a stretch may run one block short"),
    (ENGINE, "        not inst.preempted\n        and inst.head", "        inst.head",
     "admission in a step that preempted"),
    (ENGINE, "max(gaps[k], gap)", "gap", "the longest gap is the latest"),
    (ENGINE, "prefix.match(world, l, i, row, goal - 1)", "prefix.match(world, l, i, row, goal)",
     "a prompt may be all hits"),
    (PREFIX, "        unit = inst.oldest\n", "        unit = inst.newest\n",
     "evict the most recently used prefix"),
    (LANE, "if at <= until and r != NONE:", "if at < until and r != NONE:",
     "iterations before arrivals at equal times"),
    (ENGINE, "max(now, inst.link_until) + inst.copying", "now + inst.copying",
     "a swap does not wait for the link"),
    (MIGRATION, "if left <= world.episode", "if left < world.episode", "one block fewer in the last copy"),
    (MIGRATION, "    world.instance[l, d].free += source.out_reserved\n", "",
     "an aborted migration keeps its memory"),
    (PREEMPTION, "        inst.host_free -= blocks\n", "", "host memory has no end"),
)  # fmt: skip


def survives(mutation: tuple[str, str, str, str]) -> bool:
    """Whether the tests pass although the mutation is applied."""
    file, old, new, _ = mutation
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ROOMS:
            source = ROOT / name
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        text = (copy / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file}: {old!r} stands there {text.count(old)} times; mend the mutation")
        (copy / file).write_text(text.replace(old, new))
        environment = {**os.environ, "PYTHONPATH": folder, "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
        tests = subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False)
        return tests.returncode == 0


def main() -> int:
    """Run the chosen mutations, print a line for each."""
    chosen = [MUTATIONS[int(k)] for k in sys.argv[1:]] or list(MUTATIONS)
    missed = 0
    for mutation in chosen:
        alive = survives(mutation)
        missed += alive
        print(f"{'MISSED' if alive else 'caught'}  {mutation[0]}: {mutation[3]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
