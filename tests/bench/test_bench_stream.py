"""`python -m bench stream`: both formulations train alike; records, tables, plots, refused runs and mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.core import results
from bench.e2e.models import set_dropout
from bench.e2e.non_differentiable import differentiable_users
from bench.e2e.stream import data as stream_data
from bench.e2e.stream import records, report
from bench.e2e.stream.check import WindowCheck
from bench.e2e.stream.data import generate_stream
from bench.e2e.stream.paper_run import PaperRun
from bench.e2e.stream.runs import OurRun
from bench.e2e.stream.settings import POOLINGS, Settings
from bench.e2e.stream.step_clock import PARTS
from bench.e2e.stream.windows import StreamBenchmark
from bench.paper.parameter_names import paper_levels
from bench.report import plots
from tests.fakes import FailingCapture, FakeCapture
from xsmoe.stream import Stream, StreamingTrainer
from xsmoe.stream.cuda import graph_steps

TINY = Settings(users=24, items=120, new_items=12, windows=3, batch=8, dim=24, rank=4)
ARGUMENTS = [
    "stream", "--users", "24", "--items", "120", "--new-items", "12", "--windows", "3", "--batch", "8", "--dim", "24",
    "--rank", "4",
]  # fmt: skip


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_dropout_both_train_and_rank_alike(pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: dict[str, list[np.ndarray]] = {"published": [], "ours": []}
    for kind, name in ((PaperRun, "published"), (OurRun, "ours")):
        real = kind.ranks

        def ranks(run: Any, task: Any, real: Any = real, name: str = name) -> np.ndarray:
            ranked[name].append(real(run, task))
            return ranked[name][-1]

        monkeypatch.setattr(kind, "ranks", ranks)
    settings = replace(TINY, dropout=0.0, pooling=pooling)
    for window in StreamBenchmark(settings, generate_stream(settings)).windows():
        published, ours = window.runs["published"], window.runs["ours"]
        assert not ours.refused
        # Adam takes a full step even if rounding alone determines the sign of a gradient.
        assert ours.losses == pytest.approx(published.losses, rel=1e-5 if window.window == 0 else 5e-3)
        assert window.experts == window.window + 1
    # A warm-up and two tests. In the first test, rounding errors have not grown yet.
    _, mine, _ = ranked["ours"]
    _, theirs, _ = ranked["published"]
    assert len(mine) == 24
    assert np.isfinite(mine).any()
    assert (mine == theirs).mean() > 0.9


def test_graphs_have_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_steps, "CudaCapture", FakeCapture)
    settings = replace(TINY, windows=2, top_k=1, graph=True)
    found = list(StreamBenchmark(settings, generate_stream(settings)).windows())
    for window in found:
        for name, parts in (("published", len(PARTS)), ("ours", 1), ("ours-top-1", 1)):
            assert np.array(window.runs[name].steps).shape == (settings.epochs * window.batches, parts)
    names = ["published", "ours", "ours-top-1"]
    run = records.StreamRun([], {}, settings.__dict__, list(PARTS), names, found, 1.0)
    assert "top-k 1, ours as CUDA graphs" in report.settings_line(run)
    assert {line.split("|")[1].strip() for line in report.parts(run)[4:]} == {"published"}


def test_a_run_that_cannot_be_captured_is_refused_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_steps, "CudaCapture", FailingCapture)
    settings = replace(TINY, windows=2, graph=True)
    (window,) = StreamBenchmark(settings, generate_stream(settings)).windows()
    assert "operation not permitted" in (window.runs["ours"].refused or "")
    assert window.timed("published") is not None


def test_ours_trains_as_the_trainer_does() -> None:
    settings = replace(TINY, windows=2)
    data = generate_stream(settings)
    streaming = StreamBenchmark(settings, data)
    (first, _) = streaming.windows()
    run = next(run for run in streaming.runs if run.name == "ours")
    assert isinstance(run, OurRun)
    again = OurRun("again", settings, data)
    trainer = StreamingTrainer(again.model, Stream(data.windows, data.features, protocol="paper"), settings.config())
    lines = trainer.fit()
    assert [line["loss"] for line in lines if line["kind"] == "epoch"][:2] == first.runs["ours"].losses
    (tested,) = [line for line in lines if line["kind"] == "test"]
    assert tested["all"] == first.runs["ours"].test_scores
    assert tested["popularity"]["all_time"] == first.popularity
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_both_grow_by_the_same_gate_rows() -> None:
    settings = replace(TINY, dropout=0.0, epochs=1)
    streaming = StreamBenchmark(settings, generate_stream(settings))
    theirs, ours = streaming.runs
    assert isinstance(theirs, PaperRun)
    assert isinstance(ours, OurRun)
    for window in streaming.windows():
        routers = {f"sides.{modality}.banks.{level}": bank for modality, level, bank in ours.model.items.banks()}
        assert all(bank.count_in_eval and bank.num_frozen == window.window for bank in routers.values())
        for key, moe in paper_levels(theirs.model.item_encoder):
            assert len(moe.experts) == routers[key].num_experts == window.window + 1
            assert [one.fc_up.weight.requires_grad for one in moe.experts] == [False] * window.window + [True]
        for modality, level, bank in ours.model.items.banks():
            router = theirs.model.item_encoder.sides[modality].routers[level].linear.weight
            # The rows differ by a few steps. The distance of independent rows would be as large as their norms.
            assert (bank.router - router).norm(dim=1).max() < 0.05 * router.norm(dim=1).min()


def test_equal_batches_and_weights_with_dropout() -> None:
    data = generate_stream(TINY)
    streaming = StreamBenchmark(TINY, data)
    theirs, ours = streaming.runs
    assert isinstance(theirs, PaperRun)
    assert isinstance(ours, OurRun)
    seen: dict[str, list[list[int]]] = {"published": [], "ours": []}
    ours.model.register_forward_pre_hook(
        lambda _, given: seen["ours"].append(sorted(given[1].items[given[1].rejected[given[1].rejected >= 0]].tolist()))
    )
    theirs.model.register_forward_pre_hook(
        lambda _, given: seen["published"].append(sorted((given[0].item_ids[given[0].item_ids > 0] - 1).tolist()))
    )
    list(streaming.windows())
    assert seen["ours"] == seen["published"] != []


@pytest.mark.parametrize("which", ["loss", "experts", "counters"])
def test_a_wrong_step_is_refused(
    which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = WindowCheck._our_results

    def wrong(*given: Any) -> dict[str, torch.Tensor]:
        found = real(*given)
        if which == "loss":
            found["loss"] = found["loss"] * 1.001
        if which == "experts":
            found["items.sides.text.banks.1.up"][0, 0, 0] += found["items.sides.text.banks.1.up"].norm() / 100
        if which == "counters":
            found["sides.image.banks.0 norm"][-1] *= 1.001
        return found

    monkeypatch.setattr(WindowCheck, "_our_results", wrong)
    assert main(ARGUMENTS) == 1
    printed = capsys.readouterr()
    assert "refused: ours in window 0: " in printed.err
    assert "- window 0, 1 expert: ours refused: " in printed.out
    assert "- window 0: ours refused: " in printed.out
    assert "faster" not in printed.out


def test_users_near_non_differentiable_points_are_not_compared() -> None:
    settings = replace(TINY, top_k=1)
    data = generate_stream(settings)
    run = OurRun("ours", settings, data, top_k=1)
    torch.manual_seed(0)  # of the new gate row; with others, some of the few users can be near a point
    run.model.items.expand()
    (window, *_) = data.windows
    users = settings.config().split(window).train
    share = np.full(data.features.num_items, 1 / data.features.num_items)
    model = run.copy().double()
    set_dropout(model, 0.0)
    given = WindowCheck(settings, data, users, share)._step_input(model, users, torch.float64)
    assert differentiable_users(model, given).float().mean() > 0.8

    inner = model.users.blocks[1].inner
    weight, bias = inner.weight[7].clone(), inner.bias[7].clone()
    with torch.no_grad():
        inner.weight[7], inner.bias[7] = 0, 1e-7
    assert not differentiable_users(model, given).any()
    with torch.no_grad():
        inner.weight[7], inner.bias[7] = weight, bias
    assert differentiable_users(model, given).any()
    for _, _, bank in model.items.banks():
        with torch.no_grad():
            bank.router[2] = bank.router[1]
        break
    assert not differentiable_users(model, given).any()


def test_a_wrong_run_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real, compared = WindowCheck._our_results, []

    def wrong(window: WindowCheck, model: Any, *given: Any) -> dict[str, torch.Tensor]:
        found = real(window, model, *given)
        if model.items.top_k is not None and model.items.sides["text"].num_experts[0] == 2:
            compared.append(found)
            # The first result is compared; the others are the reference and the exact result.
            found["loss"] = found["loss"] * (1.001 if len(compared) == 1 else 1)
        return found

    monkeypatch.setattr(WindowCheck, "_our_results", wrong)
    settings = replace(TINY, top_k=1)
    first, second, third = StreamBenchmark(settings, generate_stream(settings)).windows()
    assert first.timed("ours-top-1") is not None
    assert "loss" in (second.runs["ours-top-1"].refused or "")
    assert not second.runs["ours-top-1"].steps
    assert second.timed("ours") is not None
    assert set(third.runs) == {"published", "ours"}


def test_the_file_the_tables_and_the_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "new" / "run.json", tmp_path / "plots"
    assert main([*ARGUMENTS, "--top-k", "2", "--json", str(path), "--plot", str(folder)]) == 0
    printed = capsys.readouterr().out
    found = records.load(path)
    assert found.command[0] == "stream"
    assert found.settings["users"] == 24
    assert found.names == ["published", "ours", "ours-top-2"]
    assert found.machine["threads"] == torch.get_num_threads()
    assert [window.experts for window in found.windows] == [1, 2, 3]
    for window in found.windows:
        for name, one in window.runs.items():
            assert one.refused is None
            assert len(one.steps) == window.batches * 2
            assert {len(parts) for parts in one.steps} == {len(PARTS)}
            assert min(min(parts) for parts in one.steps) > 0
            assert len(one.epochs) == len(one.losses) == 2
            # The sum of the steps is a lower bound of the epochs.
            assert sum(one.step_seconds) <= sum(one.epochs)
            assert one.peak_bytes
            assert (one.error is None) == (name == "published")
            last = window.window == 2
            assert (one.test_scores is None) == last
            assert (one.difference is None) == (last or name == "published")
    published, ours, sparse = (found.windows[2].runs[name] for name in found.names)
    assert published.rows == 88 > ours.rows == sparse.rows
    assert published.optimizer_bytes == pytest.approx(ours.optimizer_bytes, rel=0.01)
    # The CPU kernels keep prepacked weights of frozen experts.
    assert ours.weight_bytes >= sparse.weight_bytes == pytest.approx(published.weight_bytes, rel=0.01)

    assert report.report(found) in printed
    for text in ("experts", "ours step ms", "x ours-top-2", "peak MiB", "HR@10 published", "| backward |", "machine: "):
        assert text in printed
    for block in printed.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1
    assert sorted(one.name for one in folder.iterdir()) == ["memory.png", "parts.png", "quality.png", "time.png"]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in folder.iterdir())

    assert main(["stream", "--show", str(path)]) == 0
    assert report.report(found) in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no cases"):
        results.load(path)


def test_an_interrupted_stream_is_kept_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, path = StreamBenchmark._train, tmp_path / "run.json"

    def train(streaming: StreamBenchmark, number: int, *given: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        real(streaming, number, *given)

    monkeypatch.setattr(StreamBenchmark, "_train", train)
    assert main([*ARGUMENTS, "--json", str(path)]) == 130
    assert [window.window for window in records.load(path).windows] == [0]
    assert "stopped after 1 of 3 windows" in capsys.readouterr().out


def test_without_matplotlib_a_message_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    monkeypatch.setattr(stream_data, "generate_stream", lambda settings: generate_stream(replace(settings, windows=2)))
    assert main([*ARGUMENTS, "--plot", str(tmp_path)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows", "1"], "--windows must be at least 2, not 1"),
        (["--new-items", "-1"], "--new-items must be at least 0, not -1"),
        (["--top-k", "0"], "--top-k must be at least 1, not 0"),
        (["--graph"], "--graph: CUDA graphs need --device cuda"),
        (
            ["--items", "31", "--windows", "2"],
            "--items must be at least 16 for each of the 2 windows, that is 32, not 31",
        ),
        (["--dropout", "1"], "--dropout must be in [0, 1), not 1"),
        (["--lr", "0"], "--lr must be above 0, not 0"),
        (["--lr", "nan"], "--lr must be above 0, not nan"),
        (["--show", "no-such-file.json"], "no-such-file.json"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_written_are_named_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    for arguments, message in (
        (["--json", str(taken / "run.json")], "--json: cannot write"),
        (["--json", str(tmp_path)], "--json must name a file"),
        (["--plot", str(taken)], "--plot: cannot make"),
    ):
        assert main([*ARGUMENTS, *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--pooling", "max"], ["--epochs", "two"], ["--dtype", "float16"]])
def test_argparse_names_invalid_choices(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["stream", *arguments])
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"schema": 1, "cases": []}))
    with pytest.raises(ValueError, match="was not written by"):
        records.load(path)
    path.write_text(json.dumps({"kind": "stream", "schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        records.load(path)


def test_hidden_states_have_one_first_level_with_cls_pooling() -> None:
    for pooling, rows in (("mean", 5), ("cls", 1)):
        data = generate_stream(replace(TINY, pooling=pooling))
        found = data.features.hidden(np.arange(5))
        assert {levels[0].shape[0] for levels in found.values()} == {rows}
        for name, levels in found.items():
            torch.testing.assert_close(data.table[name][1:6, 0], levels[0].expand(5, -1))
            assert not data.table[name][0].any()
