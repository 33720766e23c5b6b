"""Training over a stream of windows: test on the new one, prune, expand, train, keep weights, checkpoint."""

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
from xsmoe.stream.cuda.graph_steps import WITHOUT, CapturedSteps, refusal, wanted
from xsmoe.stream.cuda.out_of_memory import ranking_memory, training_memory
from xsmoe.stream.epoch import train_epoch
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.evaluation.metrics import per_user, summarize
from xsmoe.stream.evaluation.seen_items import StreamMemory
from xsmoe.stream.evaluation.window_evaluation import evaluate_window
from xsmoe.stream.growth import grow, grow_ids, novelty, shares
from xsmoe.stream.hidden_states.conditioned import fit_window
from xsmoe.stream.hidden_states.device_cache import ResidentFeatures
from xsmoe.stream.hidden_states.placement import Placement
from xsmoe.stream.precision import LossScaler, autocast_dtype, loss_scaler
from xsmoe.stream.requirements import require_fitting, require_next
from xsmoe.stream.resources import Stopwatch
from xsmoe.stream.source import Stream
from xsmoe.stream.state.best_epoch import restore, snapshot, why_last
from xsmoe.stream.state.checkpoints import CheckpointError
from xsmoe.stream.state.compatibility import identity, require_same
from xsmoe.stream.state.progress import Progress
from xsmoe.stream.state.run_folder import RunFolder, window_digest
from xsmoe.stream.state.saved_conditions import split_state
from xsmoe.stream.state.weight_average import assign, averaged
from xsmoe.stream.state.window_state import WindowState

Listener = Callable[[str, dict[str, Any]], None]
SELECTED_BY = "NDCG@10"


class StreamingTrainer:
    """Trains a recommender on a stream, window by window (arXiv 2508.05993).

    Args:
        model: trained in place.
        stream: the windows that `fit` goes through, and the items' hidden states.
        config: every choice of the protocol.
        folder: where metrics, checkpoints and the exported model go; a run that is found there goes on. None keeps
            everything in memory.
        listener: told of every event as (name, fields): "resumed", "warning", "begin", "batch", "epoch", "window" and
            "test".

    Raises:
        ValueError: the folder holds a run of another configuration, model or store, or is in use; no checkpoint in it
            is whole; the device has no such precision.
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
        self.memory = StreamMemory()
        self.progress = Progress(digests=[])
        self.metrics: list[dict[str, Any]] = []
        self._tell = listener or (lambda event, fields: None)
        self._unusable: str | None = None
        self._without_graphs = refusal(self.config)
        self._placement = Placement(self.config, None if folder is None else Path(folder) / "conditioned")
        self._window = WindowState()
        require_fitting(model, stream, self.config)
        for _, _, bank in model.items.banks():
            bank.count_in_eval = self.config.protocol == "paper"
        self._identity = identity(self.config, self.model, stream.features)
        self._folder = RunFolder(Path(folder)) if folder is not None else None
        if self._folder is not None:
            try:
                self._resume(self._folder)
            except BaseException:
                self._folder.close()
                raise
        if self.config.graph and self._without_graphs is not None:
            self._warn(WITHOUT.format(self._without_graphs))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the run's folder; the trainer takes no more windows."""
        self._unusable = "it was closed"
        self._placement.close()
        if self._folder is not None:
            self._folder.close()

    @property
    def windows_done(self) -> int:
        """Windows that are trained to the end."""
        return self.progress.windows_done

    @property
    def features(self) -> ItemFeatures:
        """The items' hidden states as the model takes them, on the device if they fit there."""
        placed, message = self._placement.of(self.stream.features, self.model.items)
        if message is not None:
            self._warn(message)
        return placed

    def fit(self) -> list[dict[str, Any]]:
        """Takes all windows of the stream, those that the run has taken before excepted.

        Returns:
            The lines of metrics.jsonl.

        Raises:
            ValueError: the run has taken other windows before.
            TrainingDiverged: the loss is not finite.
            OutOfMemory: the device's memory does not suffice.
            CheckpointError: a checkpoint cannot be written.
        """
        for number, window in enumerate(self.stream.windows):
            if number < self.windows_done:
                if window_digest(window) != self.progress.digests[number]:
                    raise ValueError(f"window {number} of the stream is not the one that this run was trained on")
                continue
            self.step(window)
        return self.metrics

    def step(self, window: Window) -> dict[str, Any]:
        """Takes the next window: tests the model on it, prunes, expands, and trains on it.

        The first window is only trained on. A window whose training was cut short goes on where it stopped.

        Args:
            window: item ids are rows of `stream.features`; its `number` is replaced by its place in the run.

        Returns:
            The window's line of metrics.jsonl.

        Raises:
            ValueError: users or items out of range, timestamps that do not ascend, a window that the run has taken, or
                another window's training has been cut short.
            RuntimeError: the trainer was closed, or an exception cut an earlier window short.
        """
        if self._unusable is not None:
            raise RuntimeError(f"this trainer takes no more windows: {self._unusable}; make a new one on its folder")
        self.check(window)
        resuming, number = self.progress.epoch is not None, self.windows_done
        window = Window(number, window.users, window.items, window.timestamps)
        digest = window_digest(window)
        # What follows changes weights and files together: after an exception only the last checkpoint is sound.
        self._unusable = f"the training of window {number} was cut short"
        splits = self.config.split(window)
        self._tell("begin", {"window": number, "of": len(self.stream.windows), "interactions": len(window)})
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
        """Raises what `step` would raise of a window before it changes anything."""
        require_next(window, self.progress, self.config, self.stream.features.num_items)

    def _test_and_grow(self, number: int, splits: WindowSplits) -> None:
        """Tests the model of the window before on this one, then prunes and expands."""
        watch = Stopwatch(self.device)
        tested = evaluate_window(self.model, self.features, splits, self.memory, self.config)
        found = {"novelty": novelty(tested["all"], self.metrics, number)} if self.config.grow == "novelty" else {}
        novel = all(one["novel"] for one in found.values())
        self._record(
            {
                "kind": "test",
                "window": number - 1,
                "tested_on": number,
                **tested,
                **found,
                **grow(
                    self.model.items, self.config, number, trains=len(splits.train) > 0, novel=novel, tell=self._warn
                ),
                "time": watch.read(),
            }
        )

    def _train(self, number: int, window: Window, splits: WindowSplits) -> dict[str, Any]:
        config, progress, watch = self.config, self.progress, Stopwatch(self.device)
        self.memory.add_training(splits)
        with np.errstate(divide="ignore"):
            log_share = np.log(item_share(splits.train, self.stream.features.num_items))
        task = self._validation_task(splits)
        scaler = loss_scaler(config)
        optimizer = self._window.make_optimizer(self.model, config, scaler)
        graphs = None
        if wanted(config):
            graphs = CapturedSteps(self.model, optimizer, scaler, self._warn, reason=self._without_graphs)
        while progress.epoch is not None and len(splits.train) and not self._trained_out():
            self._epoch(number, progress.epoch, splits.train, log_share, optimizer, scaler, graphs, task)
        if graphs is not None:
            self._without_graphs = graphs.reason
            graphs.forget()
        kept = self._keep(number, len(splits.train), task)
        self.memory.add_rest(splits)
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
            "experts": {name: side.num_experts for name, side in self.model.items.ladders().items()},
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

    def _trained_out(self) -> bool:
        """Whether the window in training has had all its epochs, or has not become better for too long."""
        config, progress = self.config, self.progress
        assert progress.epoch is not None
        return progress.epoch >= config.epochs or bool(config.patience and progress.stale >= config.patience)

    def _validation_task(self, splits: WindowSplits) -> RankingTask:
        candidates = self.memory.known
        if self.config.validation_candidates == "split":
            candidates = np.unique(splits.validation.items)
        return RankingTask.build(splits.validation, candidates, self.memory.history, self.config.repeats)

    def _epoch(
        self,
        number: int,
        epoch: int,
        sequences: Sequences,
        log_share: np.ndarray,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler | None,
        graphs: CapturedSteps | None,
        task: RankingTask,
    ) -> None:
        # Ahead of the watch, because what places them on the device is no step's time.
        features = self.features
        where, resident = f"window {number}, epoch {epoch}", isinstance(features, ResidentFeatures)
        progress, watch = self.progress, Stopwatch(self.device)
        sequences_a_step = min(self.config.batch_for(len(sequences)), len(sequences))
        with training_memory(self.config, where, sequences=sequences_a_step, resident=resident):
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
                on_batch=lambda done, of: self._tell(
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
            self._window.average = averaged(self._window.average, self.model, epoch)
        progress.epoch = epoch + 1
        progress.steps += trained["steps"]
        self._record(
            {
                "kind": "epoch",
                "window": number,
                "epoch": epoch,
                **trained,
                "validation": validation,
                "best": progress.best_epoch == epoch,
                "time": {**watch.read(), "step_ms": step_ms},
            }
        )
        self._window.take(optimizer, scaler)
        self._checkpoint()

    def _validate(self, task: RankingTask, where: str, graphs: CapturedSteps | None = None) -> dict[str, Any]:
        """The model's metrics on a window's validation split."""

        def rank() -> np.ndarray:
            return rank_with_model(self.model, self.features, task, self.device)

        resident = isinstance(self.features, ResidentFeatures)
        with ranking_memory(self.config, f"{where}: the validation", resident=resident):
            return summarize(per_user(rank() if graphs is None else graphs.making_room("validation", rank)))

    def _keep(self, number: int, train_sequences: int, task: RankingTask) -> dict[str, Any]:
        """Give the model the weights that the window ends with, and say which those are."""
        if self._window.best is not None:
            restore(self.model, self._window.best, counters=self.config.protocol != "paper")
            best = self.progress.best_epoch
            return {"kept": "best", "best_epoch": best, "validation": self._validation_of(best)}
        validation = self._validation_of((self.progress.epoch or 0) - 1)
        if self._window.average is not None:
            assign(self.model, self._window.average)
            validation = None
        # Under "paper" an evaluation counts in the utilization, so that one more would change what is pruned.
        if validation is None and train_sequences and len(task) and self.config.protocol != "paper":
            validation = self._validate(task, f"window {number}")
        if self.config.keep != "best" and train_sequences:
            return {"kept": self.config.keep, "best_epoch": None, "validation": validation}
        reason = why_last(self.config, train_sequences, len(task))
        self._warn(f"window {number} keeps its last epoch: {reason}")
        return {"kept": "last", "reason": reason, "best_epoch": None, "validation": validation}

    def _validation_of(self, epoch: int | None) -> dict[str, Any] | None:
        """What an epoch of the window in training had by validation."""
        window = self.windows_done
        lines = (line for line in reversed(self.metrics) if line["kind"] == "epoch" and line["window"] == window)
        return next((line["validation"] for line in lines if line["epoch"] == epoch), None)

    def _warn(self, message: str) -> None:
        self._tell("warning", {"message": message})

    def _record(self, line: dict[str, Any]) -> None:
        self.metrics.append(line)
        if self._folder is not None:
            self._folder.append(line)
        self._tell(line["kind"], line)

    def _checkpoint(self) -> None:
        if self._folder is None:
            return
        weights, _ = split_state(self.model)
        self._folder.checkpoints.save(
            {
                **self._identity,
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
                raise CheckpointError(f"{folder.path} has metrics but no checkpoint; restore it or use another folder")
            return
        path, state = found
        require_same(folder.path, state, self.config, self.model, self.stream.features)
        self.model.load_state_dict({**state["model"], **folder.conditions.load(state.get("conditions"))})
        self.progress, self._window = Progress(**state["progress"]), WindowState.of(state)
        self.metrics = folder.rewind(state["metrics_size"])
        for number, digest in enumerate(self.progress.digests[: self.windows_done]):
            self.memory.add(self.config.split(folder.load_window(number, digest)))
        self._tell(
            "resumed", {"checkpoint": str(path), "windows_done": self.windows_done, "epoch": self.progress.epoch}
        )
