"""ServeGym: train, evaluate and export learned schedulers for LLM serving.

The rooms `envs/`, `agents/`, `models/` and `runtime/` stand at the top of the repository and are
installed inside this package. When Python runs from a checkout, the repository root joins the search
path of the package, so that `servegym.envs` means the same in both cases.
"""

from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "envs").is_dir():
    __path__.append(str(_ROOT))
