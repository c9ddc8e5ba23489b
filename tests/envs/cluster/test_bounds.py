"""No kernel of the cluster model reads or writes outside of its arrays, whatever happens in an episode.

The kernels of `models` read behind the rows of their own memory on purpose, and so do not stand here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PLAYS = ("test_engine.py", "test_mechanisms.py", "test_questions.py", "test_vector.py")


@pytest.mark.slow
def test_indices_stay_inside(tmp_path):
    checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}  # kernels on disk have no checks
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(str(HERE / name) for name in PLAYS)],
        env=os.environ | checked, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
