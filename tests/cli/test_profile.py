"""Option `--profile`, and out-of-memory errors in the command line."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.helpers import Place, run, succeed, train_arguments
from xsmoe.stream import epoch
from xsmoe.stream.state.run_folder import read_metrics

pytestmark = pytest.mark.usefixtures("one_plot")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in read_metrics(folder)]


def test_out_of_memory_is_one_line_and_the_command_can_be_repeated_with_a_profile(
    prepared: Place, trained: Place, copy_of: Callable[[Place], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = copy_of(prepared)
    real, steps = epoch.train_step, []

    def step(*arguments: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has\nless")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(epoch, "train_step", step)
        outcome = run(*train_arguments(place))
    assert outcome.code == 2
    assert outcome.err.startswith("xsmoe: error: window 0, epoch 1: a training step of 8 sequences does not fit")
    assert outcome.err.count("\n") == 1
    assert "Try --batch-size 4" in outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    assert len(lines(place.run)) == 1

    folder = place.root / "profiles" / "first"
    # Results do not depend on this setting. The run keeps it from now on.
    out = succeed(*train_arguments(place), "--store-gib", "0.5", "--profile", folder)
    assert json.loads((place.run / "config.json").read_text())["stream"]["store_gib"] == 0.5
    assert "Resuming after" in out
    assert lines(place.run) == lines(trained.run)
    assert len(re.findall(r"^Profile of 10 steps \(window 1, epoch \d\), mean per step$", out, re.MULTILINE)) == 1
    for name in ("data", "encode", "  counters", "attend", "loss", "backward", "optimizer", "all"):
        assert re.search(rf"^{name} .*%$", out, re.MULTILINE), name
    assert f"Trace: {folder / 'trace.json.gz'}; open it at https://ui.perfetto.dev" in out
    with gzip.open(folder / "trace.json.gz") as file:
        assert {"encode", "attend", "loss", "backward", "optimizer", "counters"} <= {
            event["name"] for event in json.load(file)["traceEvents"]
        }
    assert "profile" not in (place.run / "config.json").read_text()

    more = ["--interactions", place.more, "--items", place.more_items]
    updated = succeed("update", place.run, *more, "--profile", folder)
    assert "because this command ran 6 training steps, but the profile starts after 8 steps" in updated


@pytest.mark.parametrize("command", ["train", "update"])
def test_unusable_profile_folder_is_reported_before_training(
    prepared: Place, trained: Place, copy_of: Callable[[Place], Place], command: str
) -> None:
    place = copy_of(prepared if command == "train" else trained)
    log = place.root / "raw" / "log.csv"
    arguments = train_arguments(place) if command == "train" else ["update", place.run, "--interactions", place.more]
    before = lines(place.run)
    for folder, message in [(log, "log.csv is a file; give a folder"), (log / "below", "below: Not a directory")]:
        outcome = run(*arguments, "--profile", folder)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert outcome.err.startswith("xsmoe: error: --profile: ")
        assert message in outcome.err
    assert lines(place.run) == before
    assert (place.run / "config.json").exists() == (command == "update")
