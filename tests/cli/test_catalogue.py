"""Command `xsmoe prepare catalogue`: the options are passed to the generator."""

from pathlib import Path

import pytest

from tests.cli.helpers import succeed
from xsmoe.data import Dataset
from xsmoe.data.catalogue.generator import generate


@pytest.mark.parametrize("returning", [0, 2])
def test_command_equals_the_generator(tmp_path: Path, returning: int) -> None:
    sizes = ["--windows", 3, "--users", 20, "--items", 60]
    succeed("prepare", "catalogue", tmp_path / "out", *sizes, *(["--returning", returning] if returning else []))
    catalogue = generate(num_windows=3, users=20, items=60, returning=returning)
    assert Dataset.load(tmp_path / "out").interactions.items.tolist() == catalogue.interactions().items.tolist()
