"""TensorBoard events of a run."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xsmoe.extras import extra

Line = Mapping[str, Any]


class TensorBoard:
    """Writes a run's metrics as TensorBoard events.

    When a run is resumed, all events are written again from metrics.jsonl. This removes events of an interrupted epoch.
    The step of an epoch counts through all windows. The step of a test is the number of its test window.

    Args:
        folder: folder for these events only; its content is replaced.
        metrics: lines of metrics.jsonl so far.
    """

    def __init__(self, folder: Path, metrics: Sequence[Line]) -> None:
        with extra("train"):
            from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        self._epochs = 0
        for line in metrics:
            self(line["kind"], line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def __call__(self, event: str, fields: Line) -> None:
        """Handle an event of the trainer."""
        if event == "epoch":
            self._epoch(fields)
        elif event == "window":
            self._window(fields)
        elif event == "test":
            self._test(fields)

    def _epoch(self, line: Line) -> None:
        values = {"train/loss": line["loss"], "train/lr": line["lr"], "time/step_ms": line["time"]["step_ms"]}
        values["time/peak_rss_mib"] = line["time"]["peak_rss_mib"]
        values |= {f"train/{name}": line[name] for name in ("skipped_steps", "loss_scale") if name in line}
        if line["validation"] is not None:
            values |= {f"validation/{name}": line["validation"][name] for name in ("HR@10", "NDCG@10")}
        self._add(values, self._epochs)
        self._epochs += 1

    def _window(self, line: Line) -> None:
        values = {}
        for modality, counts in line["experts"].items():
            for level, count in enumerate(counts):
                values[f"experts/{modality}_{level + 1}"] = count
                for expert, share in enumerate(line["shares"][modality][level]):
                    if share is not None:
                        values[f"utilization/{modality}_{level + 1}_expert_{expert}"] = share
        # Validation of the weights that the window ends with. These may differ from the weights of every epoch.
        if (validation := line.get("validation")) is not None:
            values |= {f"validation_kept/{name}": validation[name] for name in ("HR@10", "NDCG@10")}
        self._add(values, line["window"])

    def _test(self, line: Line) -> None:
        summaries = {"model": line["all"], "cold": line["cold"], **line["popularity"]}
        values = {
            f"test_{metric}/{name}": summary[metric]
            for name, summary in summaries.items()
            for metric in ("HR@10", "NDCG@10")
            if summary[metric] is not None
        }
        # Lines of earlier versions have no groups.
        for name, summary in line.get("groups", {}).get("masked", {}).get("new", {}).items():
            if summary["HR@10"] is not None:
                values[f"test_new_masked_HR@10/{name}"] = summary["HR@10"]
        self._add(values, line["tested_on"])

    def _add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
