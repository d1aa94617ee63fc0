"""Fixtures every test may use: where the real recordings are, and what this machine has."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real vehicles' recordings; skips with the reason where there is none."""
    folder = Path(os.environ.get("VOLTWATCH_REAL_DATA", ROOT.parent / "shared" / "real-data"))
    if not (folder / "vehicle_a.parquet").is_file():
        pytest.skip(f"no real recordings in {folder} (set VOLTWATCH_REAL_DATA)")
    return folder
