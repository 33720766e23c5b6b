"""Where the tests find MovieLens ml-latest-small, whose licence keeps it out of the repository."""

import os
from pathlib import Path

import pytest


def movielens_folder() -> Path:
    """The folder that XSMOE_MOVIELENS names, else shared/data/ml-latest-small beside the checkout; skips if absent."""
    configured = os.environ.get("XSMOE_MOVIELENS")
    folder = Path(configured or Path(__file__).resolve().parents[2] / "shared" / "data" / "ml-latest-small")
    if not configured and not folder.is_dir():
        pytest.skip(f"needs MovieLens ml-latest-small, which is not at {folder}; set XSMOE_MOVIELENS to its folder")
    return folder
