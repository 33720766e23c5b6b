"""Training on a stream of windows: test, prune, expand, train, select weights and save a checkpoint for each window."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from xsmoe.data import Sequences, Window, WindowSplits, item_share
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.graph_steps import NO_GRAPHS, GraphedSteps, graphs_requested, no_graphs_reason
from xsmoe.stream.cuda.out_of_memory import explain_ranking_oom, explain_training_oom
from xsmoe.stream.epoch import make_optimizer, train_epoch
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.evaluation.metrics import per_user, summarize
from xsmoe.stream.evaluation.seen_items import SeenItemHistory
from xsmoe.stream.evaluation.window_evaluation import evaluate_window
from xsmoe.stream.growth import grow, grow_ids, novelty, shares
from xsmoe.stream.hidden_states.conditioned import fit_window
from xsmoe.stream.hidden_states.device_cache import DeviceCachedFeatures
from xsmoe.stream.hidden_states.placement import Placement
from xsmoe.stream.precision import LossScaler, autocast_dtype, loss_scaler
from xsmoe.stream.resources import Stopwatch
from xsmoe.stream.source import Stream
from xsmoe.stream.state.checkpoints import CheckpointError
from xsmoe.stream.state.compatibility import (
    compatibility_record,
    require_compatible_checkpoint,
    require_compatible_run,
    require_trainable_window,
)
from xsmoe.stream.state.kept_weights import (
    load_average,
    no_best_epoch_reason,
    restore_snapshot,
    snapshot,
    update_average,
)
from xsmoe.stream.state.progress import Progress, WindowState
from xsmoe.stream.state.run_folder import RunFolder, window_digest
from xsmoe.stream.state.saved_conditions import split_state

Listener = Callable[[str, dict[str, Any]], None]
SELECTED_BY = "NDCG@10"


class StreamingTrainer:
    """Trains a recommender on a stream, window by window (arXiv 2508.05993).

    Args:
        model: trained in place.
        stream: the windows for `fit`, and the items' hidden states.
        config: settings of the protocol and the training.
        folder: folder for metrics, checkpoints and the exported model. If it has a run, that run is resumed. None
            writes no files.
        listener: called with every event as (name, fields). Events are "resumed", "warning", "begin", "batch",
            "epoch", "window" and "test".

    Raises:
        ValueError: the folder has a run with another configuration, model or store; it is in use; all its checkpoints
            are damaged; or the device does not support the precision.
    """

    def __init__(
        self,
        model: Recommender,
        stream: Stream,
        config: StreamConfig | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.config = config or StreamConfig()
        autocast_dtype(self.config)
        self.stream = stream
        self.device = torch.device(self.config.device)
        self.model = model.to(self.device)
        self.seen_items = SeenItemHistory()
        self.progress = Progress(digests=[])
        self.metrics: list[dict[str, Any]] = []
        self._notify = listener or (lambda event, fields: None)
        self._unusable: str | None = None
        self._without_graphs = no_graphs_reason(self.config)
        self._placement = Placement(self.config, None if folder is None else Path(folder) / "conditioned")
        self._window = WindowState()
        require_compatible_run(model, stream, self.config)
        for _, _, bank in model.items.banks():
            bank.count_in_eval = self.config.protocol == "paper"
        self._compatibility = compatibility_record(self.config, self.model, stream.features)
        self._folder = RunFolder(Path(folder)) if folder is not None else None
        if self._folder is not None:
            try:
                self._resume(self._folder)
            except BaseException:
                self._folder.close()
                raise
        if self.config.graph and self._without_graphs is not None:
            self._warn(NO_GRAPHS.format(self._without_graphs))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the run's folder. The trainer cannot be used afterwards."""
        self._unusable = "it is closed"
        self._placement.close()
        if self._folder is not None:
            self._folder.close()

    @property
    def windows_done(self) -> int:
        """Number of windows whose training is finished."""
        return self.progress.windows_done

    @property
    def features(self) -> ItemFeatures:
        """Hidden states in the form that the model expects, on the device if they fit there."""
        placed, message = self._placement.of(self.stream.features, self.model.items)
        if message is not None:
            self._warn(message)
        return placed

    def fit(self) -> list[dict[str, Any]]:
        """Train on all windows of the stream. Windows that the run was trained on before are skipped.

        Returns:
            The lines of metrics.jsonl.

        Raises:
            ValueError: the run was trained on other windows before.
            TrainingDiverged: the loss is not finite.
            OutOfMemory: the device does not have enough memory.
            CheckpointError: a checkpoint cannot be written.
        """
        for number, window in enumerate(self.stream.windows):
            if number < self.windows_done:
                if window_digest(window) != self.progress.digests[number]:
                    raise ValueError(
                        f"window {number} of the stream is not the one that this run was trained on; use the stream "
                        "that the run was started with"
                    )
                continue
            self.step(window)
        return self.metrics

    def step(self, window: Window) -> dict[str, Any]:
        """Test the model on the next window, prune, expand, and train on the window.

        On the first window the model is only trained. If training on a window was interrupted, it is resumed.

        Args:
            window: item ids are rows of `stream.features`. Its `number` is replaced by its position in the run.

        Returns:
            The window's line of metrics.jsonl.

        Raises:
            ValueError: users or items are out of range; timestamps are not in ascending order; the run was trained on
                this window before; or training on another window was interrupted.
            RuntimeError: the trainer is closed, or an exception interrupted an earlier window.
        """
        if self._unusable is not None:
            raise RuntimeError(f"this trainer cannot be used, because {self._unusable}; create a new one on its folder")
        self.check(window)
        resuming, number = self.progress.epoch is not None, self.windows_done
        window = Window(number, window.users, window.items, window.timestamps)
        digest = window_digest(window)
        # Weights and files are now changed together. After an exception only the last checkpoint is consistent.
        self._unusable = f"training of window {number} was interrupted"
        splits = self.config.split(window)
        self._notify("begin", {"window": number, "of": len(self.stream.windows), "interactions": len(window)})
        if not resuming:
            if self._folder is not None:
                self._folder.save_window(window)
            if number > 0:
                self._test_and_grow(number, splits)
            grow_ids(self.model.items, self.stream.features.num_items)
            self.progress = Progress([*self.progress.digests, digest], epoch=0, steps=self.progress.steps)
            self._window = WindowState()
            fit_window(self.model.items, self.stream.features, splits, number, self._warn)
            self._checkpoint()
        line = self._train(number, window, splits)
        self._unusable = None
        return line

    def check(self, window: Window) -> None:
        """Raise ValueError if `step` would reject a window. Nothing is changed."""
        require_trainable_window(window, self.progress, self.config, self.stream.features.num_items)

    def _test_and_grow(self, number: int, splits: WindowSplits) -> None:
        """Test the model of the previous window on this one, then prune and expand it."""
        watch = Stopwatch(self.device)
        tested = evaluate_window(self.model, self.features, splits, self.seen_items, self.config)
        found = {"novelty": novelty(tested["all"], self.metrics, number)} if self.config.grow == "novelty" else {}
        novel = all(one["novel"] for one in found.values())
        trains = len(splits.train) > 0
        grown = grow(self.model.items, self.config, number, trains=trains, novel=novel, warn=self._warn)
        line = {"kind": "test", "window": number - 1, "tested_on": number, **tested, **found, **grown}
        self._record({**line, "time": watch.read()})

    def _train(self, number: int, window: Window, splits: WindowSplits) -> dict[str, Any]:
        config, progress, watch = self.config, self.progress, Stopwatch(self.device)
        self.seen_items.add_training(splits)
        with np.errstate(divide="ignore"):
            log_share = np.log(item_share(splits.train, self.stream.features.num_items))
        task = self._validation_task(splits)
        scaler = loss_scaler(config)
        optimizer = make_optimizer(self.model, config)
        self._window.restore(optimizer, scaler)
        graphs = None
        if graphs_requested(config):
            graphs = GraphedSteps(self.model, optimizer, scaler, self._warn, reason=self._without_graphs)
        while progress.epoch is not None and len(splits.train) and not self._training_finished():
            self._epoch(number, progress.epoch, splits.train, log_share, optimizer, scaler, graphs, task)
        if graphs is not None:
            self._without_graphs = graphs.reason
            graphs.drop()
        kept = self._load_kept_weights(number, len(splits.train), task)
        self.seen_items.add_validation(splits)
        line = {
            "kind": "window",
            "window": number,
            "interactions": len(window),
            "users": len(np.unique(splits.train.users)),
            "sequences": len(splits.train),
            "batch_size": config.batch_for(len(splits.train)),
            "items": len(np.unique(splits.train.items)),
            "left_out": {
                "k_core": len(window) - len(splits.all_pairs[0]),
                "no_sequence": len(splits.train_pairs[0]) - splits.in_train_sequences,
            },
            "epochs": progress.epoch,
            **kept,
            "experts": {name: side.num_experts for name, side in self.model.items.side_networks().items()},
            **shares(self.model.items),
            "without_graphs": self._without_graphs,
            "parameters": {
                "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                "total": sum(t.numel() for t in [*self.model.parameters(), *self.model.buffers()]),
            },
            "time": watch.read(),
        }
        self._record(line)
        self.progress = Progress(progress.digests, steps=progress.steps)
        self._window = WindowState()
        if self._folder is not None:
            self._folder.export(self.model)
        self._checkpoint()
        return line

    def _training_finished(self) -> bool:
        """Return whether the window has had all its epochs, or has not improved for `patience` validations."""
        config, progress = self.config, self.progress
        assert progress.epoch is not None
        return progress.epoch >= config.epochs or bool(config.patience and progress.stale >= config.patience)

    def _validation_task(self, splits: WindowSplits) -> RankingTask:
        candidates = self.seen_items.known
        if self.config.validation_candidates == "split":
            candidates = np.unique(splits.validation.items)
        return RankingTask.build(splits.validation, candidates, self.seen_items.history, self.config.repeats)

    def _epoch(
        self,
        number: int,
        epoch: int,
        sequences: Sequences,
        log_share: np.ndarray,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler | None,
        graphs: GraphedSteps | None,
        task: RankingTask,
    ) -> None:
        # Read before the stopwatch starts, because this may copy the hidden states to the device.
        features = self.features
        where, cached = f"window {number}, epoch {epoch}", isinstance(features, DeviceCachedFeatures)
        progress, watch = self.progress, Stopwatch(self.device)
        step_sequences = min(self.config.batch_for(len(sequences)), len(sequences))
        with explain_training_oom(self.config, where, sequences=step_sequences, cached=cached):
            trained = train_epoch(
                self.model,
                features,
                sequences,
                log_share,
                optimizer,
                self.config,
                scaler,
                window=number,
                epoch=epoch,
                on_batch=lambda done, of: self._notify(
                    "batch", {"window": number, "epoch": epoch, "done": done, "of": of}
                ),
                graphs=graphs,
            )
        step_ms = 1000 * watch.read()["seconds"] / trained["steps"]
        validation = None
        if self.config.patience and len(task) and epoch >= self.config.warmup_epochs:
            validation = self._validate(task, where, graphs)
            if progress.best_value is None or validation[SELECTED_BY] > progress.best_value:
                progress.best_epoch, progress.best_value, progress.stale = epoch, validation[SELECTED_BY], 0
                if self.config.keep == "best":
                    self._window.best = snapshot(self.model)
            else:
                progress.stale += 1
        if self.config.keep == "ema":
            self._window.average = update_average(self._window.average, self.model, epoch)
        progress.epoch = epoch + 1
        progress.steps += trained["steps"]
        best = progress.best_epoch == epoch
        line = {"kind": "epoch", "window": number, "epoch": epoch, **trained, "validation": validation, "best": best}
        self._record({**line, "time": {**watch.read(), "step_ms": step_ms}})
        self._window.update(optimizer, scaler)
        self._checkpoint()

    def _validate(self, task: RankingTask, where: str, graphs: GraphedSteps | None = None) -> dict[str, Any]:
        """Return the model's metrics on a window's validation split."""

        def rank() -> np.ndarray:
            return rank_with_model(self.model, self.features, task, self.device)

        cached = isinstance(self.features, DeviceCachedFeatures)
        with explain_ranking_oom(self.config, f"{where}: the validation", cached=cached):
            return summarize(per_user(rank() if graphs is None else graphs.retry_without_graphs("validation", rank)))

    def _load_kept_weights(self, number: int, train_sequences: int, task: RankingTask) -> dict[str, Any]:
        """Load the weights that the window ends with, and return the fields of metrics.jsonl that describe them."""
        if self._window.best is not None:
            restore_snapshot(self.model, self._window.best, counters=self.config.protocol != "paper")
            best = self.progress.best_epoch
            return {"kept": "best", "best_epoch": best, "validation": self._validation_of(best)}
        validation = self._validation_of((self.progress.epoch or 0) - 1)
        if self._window.average is not None:
            load_average(self.model, self._window.average)
            validation = None
        # With protocol "paper" an evaluation changes the utilization counters. Another one would change the pruning.
        if validation is None and train_sequences and len(task) and self.config.protocol != "paper":
            validation = self._validate(task, f"window {number}")
        if self.config.keep != "best" and train_sequences:
            return {"kept": self.config.keep, "best_epoch": None, "validation": validation}
        reason = no_best_epoch_reason(self.config, train_sequences, len(task))
        self._warn(f"window {number} keeps its last epoch: {reason}")
        return {"kept": "last", "reason": reason, "best_epoch": None, "validation": validation}

    def _validation_of(self, epoch: int | None) -> dict[str, Any] | None:
        """Return the recorded validation metrics of an epoch of the window in training."""
        window = self.windows_done
        lines = (line for line in reversed(self.metrics) if line["kind"] == "epoch" and line["window"] == window)
        return next((line["validation"] for line in lines if line["epoch"] == epoch), None)

    def _warn(self, message: str) -> None:
        self._notify("warning", {"message": message})

    def _record(self, line: dict[str, Any]) -> None:
        self.metrics.append(line)
        if self._folder is not None:
            self._folder.append(line)
        self._notify(line["kind"], line)

    def _checkpoint(self) -> None:
        if self._folder is None:
            return
        weights, _ = split_state(self.model)
        self._folder.checkpoints.save(
            {
                **self._compatibility,
                "progress": asdict(self.progress),
                "model": weights,
                "conditions": self._folder.conditions.save(self.model),
                **self._window.payload(),
                "metrics_size": self._folder.metrics_size(),
            }
        )

    def _resume(self, folder: RunFolder) -> None:
        found = folder.checkpoints.load_newest(self._warn)
        if found is None:
            if folder.metrics_size() > 0:
                raise CheckpointError(
                    f"{folder.path} has metrics but no checkpoint; restore it from a backup, or use another folder"
                )
            return
        path, state = found
        require_compatible_checkpoint(folder.path, state, self.config, self.model, self.stream.features)
        self.model.load_state_dict({**state["model"], **folder.conditions.load(state.get("conditions"))})
        self.progress, self._window = Progress(**state["progress"]), WindowState.from_checkpoint(state)
        self.metrics = folder.rewind(state["metrics_size"])
        for number, digest in enumerate(self.progress.digests[: self.windows_done]):
            self.seen_items.add(self.config.split(folder.load_window(number, digest)))
        self._notify(
            "resumed", {"checkpoint": str(path), "windows_done": self.windows_done, "epoch": self.progress.epoch}
        )
