"""`python -m bench quality`: runs, kept records, resumption, comparison and output."""

import argparse
import json
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.cli import quality
from bench.e2e.quality import comparison, streams
from bench.e2e.quality.run import Job, build_model, train_and_test
from bench.e2e.quality.streams import CATALOGUE, RETURNING
from bench.e2e.quality.variants import BASE, VARIANTS, select_variants
from bench.report import plots
from xsmoe.cli.commands.demo import DemoSettings
from xsmoe.cli.commands.train import cut_settings
from xsmoe.nn import XSMoE
from xsmoe.stream import StreamConfig
from xsmoe.stream import trainer as trainer_module

NAMES = ["base", "growth", "static", "copy-merge", "linear", "paper"]
TINY = {"windows": 3, "users": 16, "items": 48, "new_items": 4, "epochs": 1}
ARGUMENTS = ["quality", "--quick", "--seeds", "2", "--variants", ",".join(NAMES[1:]), "--matrix"]


class Here(Executor):
    """Perform calls immediately in this process."""

    def submit(self, call: Any, /, *given: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(call(*given, **named))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a finished comparison on a tiny stream, and its summaries. Runs are in this process."""
    folder = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "processes", lambda count: Here())
        patch.setattr(comparison, "QUICK", TINY)
        patch.setattr(streams, "IMAGE_SIZE", 16)
        assert main([*ARGUMENTS, "--folder", str(folder), "--json", str(folder / "all.json")]) == 0
        yield folder, json.loads((folder / "all.json").read_text())


def record(folder: Path, variant: str, seed: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / "returning-quick" / variant / f"{seed}.json").read_text())
    return found


def test_all_variants_are_compared_with_the_base(setting: Any) -> None:
    folder, found = setting
    assert found["stream"] == {"name": "returning-quick", **TINY, "returning": 2}
    assert list(found["variants"]) == NAMES
    for name, one in found["variants"].items():
        assert one["seeds"] == [1, 2]
        assert one["sentence"] == VARIANTS[name].sentence
        assert list(one["windows"]) == ["1", "2"]
        ranks = [rank for test in record(folder, name)["tests"] for rank in test["ranks"]]
        hits = sum(0 < rank <= 10 for rank in ranks) / len(ranks)
        assert one["HR@10"]["values"][0] == pytest.approx(hits, rel=1e-3)
        if name == BASE:
            assert one["difference"] is None
        else:
            base = found["variants"][BASE]["HR@10"]["values"]
            wanted = [mine - theirs for mine, theirs in zip(one["HR@10"]["values"], base, strict=True)]
            assert one["difference"]["HR@10"]["values"] == pytest.approx(wanted, abs=1e-4)
            # The catalogue has no ties, so that the published protocol tests the same users too.
            assert one["difference"]["HR@10"]["se_users"] is not None


def test_variants_have_their_settings(setting: Any) -> None:
    folder, _ = setting
    base, growth, static, linear = (record(folder, name) for name in ("base", "growth", "static", "linear"))
    assert base["experts"] == {"image": [1, 1], "text": [1, 1]}
    assert growth["experts"] == {"image": [3, 3], "text": [3, 3]}
    assert static["experts"] == static["key"]["experts"] == growth["experts"]
    assert linear["experts"] == {}
    assert record(folder, "copy-merge")["key"]["settings"]["new_gate"] == "copy"
    assert record(folder, "paper")["key"]["settings"]["protocol"] == "paper"
    ranks = {name: [test["ranks"] for test in record(folder, name)["tests"]] for name in NAMES}
    # Runs are equal before the first expansion.
    assert ranks["base"][0] == ranks["growth"][0] == ranks["copy-merge"][0]
    # A split leaves the function unchanged, and a few steps hardly change a rank.
    assert len({str(ranks[name]) for name in ("base", "growth", "static", "linear")}) == 4


def test_a_matrix_has_the_test_of_the_next_window_next_to_its_diagonal(setting: Any) -> None:
    folder, found = setting
    for name in NAMES:
        run = record(folder, name)
        for metric, rows in run["matrix"].items():
            assert [len(row) for row in rows] == [3] * 3
            assert [rows[n - 1][n] for n in (1, 2)] == [test[metric] for test in run["tests"]]
    own = [record(folder, BASE, seed)["matrix"]["HR@10"] for seed in (1, 2)]
    later = [
        sum(rows[model][tested] - rows[tested][tested] for model in range(3) for tested in range(model)) / 3
        for rows in own
    ]
    assert found["variants"][BASE]["matrix"]["HR@10"]["backward"]["values"] == pytest.approx(later, abs=1e-4)


@pytest.mark.parametrize("variant", [BASE, "paper"])
def test_the_trainer_reports_the_ranks_that_are_recorded(
    setting: Any, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer alone gives the same tests, and prunes by the same counts."""
    folder, _ = setting
    from xsmoe.data import Dataset
    from xsmoe.encoders import HiddenStateStore
    from xsmoe.stream import Stream, StreamingTrainer

    place = folder / "data" / "returning-quick-1"
    source = streams.generate("returning-quick", comparison.stream_of(options(folder)), 1, folder / "data")
    assert (source.dataset, source.store) == (place / "catalogue", place / "store")
    job = Job(VARIANTS[variant], 1, source, {}, False, None, folder / "unused.json")
    config, store = job.config(), HiddenStateStore.open(source.store)
    stream = Stream.build(
        Dataset.load(source.dataset).interactions, store, 3, modalities=config.modalities, **cut_settings(config)
    )
    counted: list[list[list[float]]] = []

    def grow(items: XSMoE, *arguments: Any, **named: Any) -> dict[str, Any]:
        counted.append([bank.utilization.gate.tolist() for _, _, bank in items.banks()])
        return real_grow(items, *arguments, **named)

    real_grow = trainer_module.grow
    monkeypatch.setattr(trainer_module, "grow", grow)
    with StreamingTrainer(build_model(config, "side"), stream, config.stream) as trainer:
        tests = [line["all"] for line in trainer.fit() if line["kind"] == "test"]
    alone, counted[:] = list(counted), []
    recorded = train_and_test(job)["tests"]
    assert [test["HR@10"] for test in tests] == [test["HR@10"] for test in recorded]
    assert counted == alone
    if variant == BASE:
        assert recorded == record(folder, BASE)["tests"]


def options(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quality.add_to(parser.add_subparsers())
    found = parser.parse_args([*ARGUMENTS, "--folder", str(folder), *more])
    found.given = []
    return found


def test_finished_runs_are_not_repeated(
    setting: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = setting
    performed: list[tuple[str, int]] = []

    def perform(job: Job) -> dict[str, Any]:
        performed.append((job.variant.name, job.seed))
        return record(folder, BASE, job.seed)

    monkeypatch.setattr(comparison, "train_and_test", perform)
    assert main([*ARGUMENTS, "--folder", str(folder)]) == 0
    assert performed == []
    printed = capsys.readouterr().out
    assert printed.count("(kept)") == 2 * len(NAMES)
    assert "| static " in printed
    assert "later minus own" in printed
    path = folder / "runs" / "returning-quick" / "linear" / "2.json"
    content = path.read_bytes()
    path.unlink()
    assert main([*ARGUMENTS, "--folder", str(folder)]) == 0
    assert performed == [("linear", 2)]
    path.write_bytes(content)


def test_a_failed_run_is_reported_and_stops_no_other_run(
    setting: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, _ = setting

    def perform(job: Job) -> dict[str, Any]:
        if job.seed == 2:
            raise ValueError("the loss is nan")
        return record(folder, job.variant.name, 1)

    monkeypatch.setattr(comparison, "train_and_test", perform)
    (tmp_path / "data").symlink_to(folder / "data")
    assert main([*ARGUMENTS, "--folder", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "base, seed 2: FAILED: ValueError: the loss is nan" in printed
    assert (
        "static, seed 2: FAILED: the run of this seed with growth, which determines the number of experts, failed"
        in printed
    )
    assert "linear, seed 1: HR@10" in printed


def test_runs_of_other_settings_are_refused(setting: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = setting
    assert main([*ARGUMENTS, "--folder", str(folder), "--epochs", "2"]) == 2
    assert "1.json holds a run of other settings or data; give another --folder" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--folder", str(folder), "--windows", "4"]) == 2
    assert "returning-quick-1 holds data of other parameters" in capsys.readouterr().err


def test_a_prepared_dataset_and_plots(setting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder, _ = setting
    place = folder / "data" / "returning-quick-1"
    given = ["--dataset", str(place / "catalogue"), "--store", str(place / "store"), "--windows", "2"]
    given += ["--epochs", "1", "--seeds", "2", "--variants", "linear", "--matrix", "--folder", str(tmp_path)]
    assert main(["quality", *given, "--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]) == 0
    assert plots.has_matplotlib()
    assert {path.name for path in tmp_path.glob("*.png")} == {"a.png", "a-matrix.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["stream"] == {"name": "catalogue", "windows": 2}
    assert list(found["variants"]) == ["base", "linear"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--variants", "base,none"], "--variants: no variant is called 'none'; there are base, growth,"),
        (["--dataset", "."], "--dataset and --store go together"),
        (["--dataset", ".", "--store", "nowhere"], "--store: nowhere is no folder; make it with `xsmoe prepare`"),
        (["--dataset", ".", "--store", ".", "--quick"], "--quick is for generated streams"),
    ],
)
def test_mistakes(given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "--folder", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err


def test_every_variant_can_be_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for variant in select_variants("all"):
        stream = {name: value for name, value in variant.settings.items() if name in StreamConfig.__dataclass_fields__}
        StreamConfig(**stream)
        assert set(variant.settings) - set(stream) <= {"condition", "ids"}
    assert [variant.name for variant in select_variants("linear,static,linear")] == [
        "base",
        "growth",
        "linear",
        "static",
    ]
    assert main(["quality", "--list", "--folder", str(tmp_path)]) == 0
    assert "static: The experts that growth has at its end" in capsys.readouterr().out


def test_the_streams_are_those_that_were_fixed_beforehand() -> None:
    demo = DemoSettings()
    assert (CATALOGUE.windows, CATALOGUE.users, CATALOGUE.items, CATALOGUE.epochs) == (
        *(demo.windows, demo.users, demo.items),
        demo.epochs,
    )
    assert (RETURNING.windows, RETURNING.users, RETURNING.items, RETURNING.new_items, RETURNING.returning) == (
        *(12, 400, 500),
        *(40, 4),
    )
