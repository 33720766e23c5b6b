"""The folder of MovieLens ml-latest-small for tests. Its licence does not allow a copy in the repository."""

import os
from pathlib import Path

import pytest


def movielens_folder() -> Path:
    """Return the folder in XSMOE_MOVIELENS, or shared/data/ml-latest-small next to the checkout. Skip if absent."""
    configured = os.environ.get("XSMOE_MOVIELENS")
    folder = Path(configured or Path(__file__).resolve().parents[2] / "shared" / "data" / "ml-latest-small")
    if not configured and not folder.is_dir():
        pytest.skip(f"needs MovieLens ml-latest-small, which is not at {folder}; set XSMOE_MOVIELENS to its folder")
    return folder
