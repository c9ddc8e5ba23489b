import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("envs", "agents", "models", "runtime")


def test_every_package_is_listed():
    """A sub-package that is missing from pyproject.toml is missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for room in ("servegym", *ROOMS):
        folders = {file.parent.relative_to(ROOT) for file in (ROOT / room).rglob("*.py")}
        found |= {".".join(f.parts if room == "servegym" else ("servegym", *f.parts)) for f in folders}
    assert set(listed) == found
    assert len(listed) == len(set(listed))


def test_images_are_built_from_no_more_than_git_keeps():
    """A copied environment is gigabytes, and a stale build folder old modules in the wheel."""
    git, docker = ((ROOT / name).read_text().split() for name in (".gitignore", ".dockerignore"))
    ignored = {pattern.removeprefix("**/") for pattern in docker}
    assert {pattern.rstrip("/") for pattern in git} | {".git"} <= ignored


def test_every_folder_with_code_is_a_package():
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file.parent} lacks __init__.py"


def test_rooms_are_never_imported_under_their_bare_names():
    """`agents` and `evaluate` belong to other distributions; only `servegym.agents` may be imported."""
    script = (
        "import sys, importlib, pkgutil, servegym\n"
        "for module in pkgutil.walk_packages([servegym.__path__[0]], 'servegym.'):\n"
        "    importlib.import_module(module.name)\n"
        "import servegym.envs, servegym.agents, servegym.models, servegym.runtime\n"
        "bare = {name.split('.')[0] for name in sys.modules} & {'envs', 'agents', 'models', 'runtime'}\n"
        "assert not bare, bare\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)
