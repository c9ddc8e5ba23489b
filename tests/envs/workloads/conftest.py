from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_traces():
    folder = Path(__file__).resolve().parents[4] / "shared" / "traces"
    if not folder.is_dir():
        pytest.skip(f"no recorded traces at {folder}")
    return folder
