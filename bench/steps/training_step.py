"""A training step of `xsmoe train`: hidden states from the store, both encoders, loss, backward, optimizer.

B users with eleven items each, drawn at random from I items; M modalities of D numbers at three levels; E experts of
rank R at each of the two side levels, all but the last of them frozen.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bench import published
from bench.examine import outcome
from bench.graph import on_cuda
from bench.kernels.side_moe import floor_backward, floor_forward
from bench.kinks import smooth_users
from bench.published_names import counters, published_counters, take_weights
from bench.steps.model import BLOCKS, DROPOUT, LEVELS, OUT_DIM, PLACES, drop_out
from bench.steps.our_step import ID_TABLE, OurStep, refuse, step_input
from bench.steps.published_step import PublishedStep, published_model
from bench.workload import Absent, Product, Tensors, Variant, Work, Workload
from xsmoe.encoders import HiddenStateStore, ItemFeatures, ModalitySpec
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.nn.conditioning import Condition
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.graph_steps import CapturedSteps
from xsmoe.stream.hidden_states.conditioned import ConditionedFeatures
from xsmoe.stream.precision import autocast
from xsmoe_kernels import use_backend

APPENDED = 4096
DRAWS = 20
"""Of users instead of those near a jump: almost always two."""


class TrainingStep(Workload):
    """A step, its loss and its gradients; the gate sees it without dropout, the clock with it."""

    pooling: ClassVar[str]
    # Whether utilization is counted, as every training step does.
    counted: bool = True
    # Whether items have IDs beside their content, in a table of so many rows.
    with_ids: bool = False
    id_rows: int = 1_000_000
    # Whether the model conditions hidden states.
    conditioned: bool = False
    # In steps that train; the gate sees none.
    dropout: float = DROPOUT
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32, torch.bfloat16)
    # Two side levels, the projection, two blocks of attention and feed-forward layer, and the loss.
    operators: ClassVar[int] = LEVELS + 1 + 2 * BLOCKS + 1
    letters: ClassVar[Mapping[str, Sequence[int]]] = {
        "B": (256,), "I": (20000,), "E": (8,), "M": (2,), "D": (768,), "R": (64,)
    }  # fmt: skip
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"I": (5000,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (5,), "I": (40,), "E": (3,), "D": (24,), "R": (4,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        half = self.dtype != torch.float32
        self.config = StreamConfig(device=str(self.device), precision="bfloat16" if half else "float32")

    @property
    def title(self) -> str:
        users, items, experts, modalities = (self.sizes[letter] for letter in "BIEM")
        drawn = f"{users} users, {PLACES} of {items} items each, {modalities} modalities, {experts} experts a level"
        return f"a training step with {self.pooling} pooling: {drawn}" + ", not counted" * (not self.counted)

    def variants(self) -> tuple[str, ...]:
        half = on_cuda(self.device, "published-autocast") if self.dtype != torch.float32 else ()
        return "published", *half, "compiled", "plain", *on_cuda(self.device, "ours-eager"), "ours"

    def optional(self) -> tuple[str, ...]:
        return "ours-uncounted", "ours-conditioned", "ours-ids"

    def baselines(self) -> tuple[str, ...]:
        return self.variants()[:-1]

    def draw(self) -> Tensors:
        items = self._drawn(self.sizes["B"])
        if self.dtype == torch.float32:
            # Rounding alone decides the gradient near a jump. In fewer bits the gate's measure has the same jumps.
            near = torch.arange(len(items))
            for _ in range(DRAWS):
                near = near[self._near_jumps(items[near])]
                if not len(near):
                    break
                items[near] = self._drawn(len(near))
        return {"items": items, "grad": torch.ones((), device=self.device)}

    def _drawn(self, users: int) -> Tensor:
        return torch.randint(self.sizes["I"], (users, PLACES), generator=self.generator)

    def exact(self, rows: Tensors) -> Tensors:
        return outcome(self._published("exact", torch.float64), rows)

    def reference(self) -> Variant:
        return self._published("reference")

    def build(self, name: str) -> Variant:
        if name == "published":
            return self._published(name)
        if name == "compiled":
            return self._published(name, compiled=True)
        if name == "plain":
            return self._ours(name, "reference")
        if name == "published-autocast":
            if self.device.type != "cuda":
                raise Absent(f"float16 autocast with a loss scaler is for GPUs, not for {self.device.type}")
            return self._published(name, scaled=True)
        if name == "ours-eager":
            if self.device.type != "cuda":
                raise Absent(f"on {self.device.type} no step is captured, so that ours runs as this would")
            return self._ours(name, "auto")
        if name == "ours":
            return self._ours_captured(name) if self.device.type == "cuda" else self._ours(name, "auto")
        if name == "ours-uncounted":
            easier = self._uncounted()
            return replace(easier.build("ours"), name=name, solves=easier)
        if name == "ours-ids":
            # Their table is zero where it is judged, so that it has to give what steps without give.
            return replace(self._changed(with_ids=True).build("ours"), name=name)
        if name == "ours-conditioned":
            return replace(self._changed(conditioned=True).build("ours"), name=name)
        raise ValueError(f"{self.operator} has no variant {name!r}")

    def work(self) -> Mapping[str, Work]:
        dim, rank, experts, modalities, users = (self.sizes[letter] for letter in "DREMB")
        items, rows, size = self._distinct(), users * (PLACES - 1), self.dtype.itemsize
        forward, backward = Work(), Work()
        for level in range(LEVELS):
            entering = items if level or self.pooling == "mean" else 1
            for _ in range(modalities):
                forward += floor_forward(entering, experts, dim, rank, size)
                backward += floor_backward(entering, experts, dim, rank, size, trainable=1, need_x=level > 0)
        # What follows has all its operands in cache: the projection, the blocks' products, the logits.
        inner = 4 * OUT_DIM
        single = Work(
            2.0 * items * modalities * dim * OUT_DIM
            + BLOCKS * 2.0 * rows * OUT_DIM * (4 * OUT_DIM + 2 * inner)
            + 2.0 * rows * items * OUT_DIM
        )
        return {"forward": forward + single, "backward": backward + single + single}

    def products(self) -> Sequence[Product]:
        rows, dim = self._distinct() * self.sizes["M"], self.sizes["D"]
        hidden = self.sizes["E"] * self.sizes["R"]
        # Of small sizes a product is mostly its call.
        return Product(rows, dim, hidden), Product(rows, hidden, dim), Product(1024, 1024, 1024)

    def memory(self, name: str) -> float:
        if name not in ("published", "compiled"):
            return 0.0
        places = self.sizes["B"] * PLACES
        stacks = self.sizes["M"] * (LEVELS + 4) * places * (self.sizes["E"] + 1) * self.sizes["D"] * 4.0
        return stacks + 8.0 * 4.0 * places**2

    def _distinct(self) -> int:
        """How many items of a batch are distinct, on average."""
        places, items = self.sizes["B"] * PLACES, self.sizes["I"]
        return round(items * (1 - (1 - 1 / items) ** places))

    @cached_property
    def hidden(self) -> dict[str, Tensor]:
        """For each modality (I, levels, D), what the store holds; with [CLS] pooling the first level is one row."""
        shape = self.sizes["I"], LEVELS + 1, self.sizes["D"]
        tables = {name: torch.randn(shape, generator=self.generator).to(self.dtype) for name in self.modalities}
        if self.pooling == "cls":
            for table in tables.values():
                table[:, 0] = table[0, 0]
        return tables

    @cached_property
    def store(self) -> HiddenStateStore:
        """The same on disk, as `xsmoe encode` leaves it."""
        # The folder goes when this does.
        self._folder = tempfile.TemporaryDirectory(prefix="xsmoe-bench-")
        spec = ModalitySpec(self.sizes["D"], tuple(range(LEVELS + 1)), self.dtype, pooling=self.pooling)
        store = HiddenStateStore.create(self._folder.name, dict.fromkeys(self.modalities, spec))
        for first in range(0, self.sizes["I"], APPENDED):
            rows = {name: table[first : first + APPENDED] for name, table in self.hidden.items()}
            store.append([str(first + place) for place in range(len(rows[self.modalities[0]]))], rows)
        return store

    @cached_property
    def share(self) -> np.ndarray:
        """(I,) each item's share of the training interactions, by Zipf's law."""
        weight = 1 / (1 + torch.randperm(self.sizes["I"], generator=self.generator, dtype=torch.float64))
        return (weight / weight.sum()).numpy()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The state that all variants begin with, under our names."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            return self._recommender().state_dict()

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(f"modality_{place}" for place in range(self.sizes["M"]))

    def _recommender(self, *, ids: bool = False) -> Recommender:
        dim, rank, experts = (self.sizes[letter] for letter in "DRE")
        condition: Condition = "whiten" if self.conditioned else "none"
        items = XSMoE(self.modalities, dim, LEVELS, rank, OUT_DIM, experts, condition=condition, ids=ids)
        for conditioning in items.conditions().values():
            # The time of a step does not depend on the statistics: these keep all bits, so that results are the same.
            for level in conditioning.levels:
                level.varying, level.mean, level.factor = torch.ones(dim).bool(), torch.zeros(dim), torch.eye(dim)
        for _, _, bank in items.banks():
            # As large as trained ones, so that none goes unnoticed.
            down, up = (scale * torch.randn(experts, rank, dim) for scale in (dim**-0.5, rank**-0.5))
            bank.assign(bank.router.detach(), down, up, experts - 1)
        return Recommender(items, UserEncoder(OUT_DIM, BLOCKS, dropout=self.dropout, max_length=PLACES - 1))

    def _near_jumps(self, items: Tensor) -> Tensor:
        """(B,) bool: the users at whom a gradient jumps."""
        given = step_input(self._exact_model, self.store, items, np.log(self.share), torch.float64)
        return ~smooth_users(self._exact_model, given).cpu()

    @cached_property
    def _exact_model(self) -> Recommender:
        model = self._recommender()
        model.load_state_dict(self.weights)
        model.to(self.device, torch.float64)
        drop_out(model, 0.0)
        return model

    def _uncounted(self) -> "TrainingStep":
        """The same step, of the same items and weights, without utilization counters."""
        return self._changed(counted=False)

    def _changed(self, **attributes: bool) -> "TrainingStep":
        changed = copy.copy(self)
        vars(changed).update(attributes, hidden=self.hidden, store=self.store, share=self.share, weights=self.weights)
        return changed

    def _step(self, *, captured: bool = False) -> OurStep:
        model = self._recommender(ids=self.with_ids)
        table = {ID_TABLE: torch.zeros(self.id_rows, OUT_DIM)} if self.with_ids else {}
        model.load_state_dict(model.state_dict() | self.weights | table)
        features: ItemFeatures = self.store
        if self.conditioned:
            features = ConditionedFeatures(self.store, model.items)
        room = Capacity(self.sizes["B"], PLACES - 1) if captured else None
        ours = OurStep(model.to(self.device), features, self.share, replace(self.config, graph=captured), room)
        if not self.counted:
            for _, _, bank in model.items.banks():
                # Which changes nothing else: a bank has no dropout.
                bank.eval()
        return ours

    def _ours(self, name: str, backend: str) -> Variant:
        ours = self._step()

        def forward(rows: Tensors) -> Tensors:
            drop_out(ours.model, 0.0)
            taken = ours.given(rows)
            with use_backend(backend), autocast(self.config):
                return {"y": ours.model(taken.hidden, taken.batch)}

        def whole(rows: Tensors) -> None:
            drop_out(ours.model, self.dropout)
            with use_backend(backend):
                ours.train(ours.given(rows))

        return self._variant(name, ours, forward, whole)

    def _ours_captured(self, name: str) -> Variant:
        """Graphs for the gate, without dropout and optimizer, and others for the clock."""
        ours = self._step(captured=True)
        judged, timed = (CapturedSteps(ours.model, ours.optimizer, tell=refuse) for _ in range(2))
        gradients = {key: torch.empty_like(leaf) for key, leaf in ours.leaves.items()}

        def loss_and_gradients(given: StepInput) -> Tensor:
            ours.model.zero_grad(set_to_none=True)
            with autocast(self.config):
                loss: Tensor = ours.model(given.hidden, given.batch)
            loss.backward()
            for key, leaf in ours.leaves.items():
                assert leaf.grad is not None
                gradients[key].copy_(leaf.grad)
            return loss.detach()

        def forward(rows: Tensors) -> Tensors:
            drop_out(ours.model, 0.0)
            taken = ours.given(rows)
            with autocast(self.config):
                return {"y": ours.model(taken.hidden, taken.batch)}

        def step(rows: Tensors) -> tuple[Tensors, Tensors]:
            drop_out(ours.model, 0.0)
            loss = judged(lambda given: loss_and_gradients(ours.gathered(given)), ours.sent(rows))
            return {"y": loss}, gradients

        def whole(rows: Tensors) -> None:
            drop_out(ours.model, self.dropout)
            timed(ours.train, ours.sent(rows))

        variant = self._variant(name, ours, forward, whole)
        return replace(variant, prepare=lambda rows: rows, step=step)

    def _variant(
        self, name: str, ours: OurStep, forward: Callable[[Tensors], Tensors], whole: Callable[[Tensors], None]
    ) -> Variant:
        return Variant(
            name,
            forward,
            leaves=lambda _: dict(ours.leaves),
            counters=lambda: counters(ours.model.items) if self.counted else {},
            reset=ours.model.items.reset_utilization,
            holds=lambda: [*ours.model.parameters(), *ours.model.buffers(), *self._derived(ours.model)],
            products={name: least.flop for name, least in self.work().items()},
            whole=whole,
        )

    def _derived(self, model: Recommender) -> Iterator[Tensor]:
        """What is made once of frozen weights: their packs, and their casts under autocast."""
        for _, _, bank in model.items.banks():
            if (frozen := bank.frozen_experts()) is not None:
                cast = frozen.to(self.dtype)
                yield from (tensor for tensor in (cast.down, cast.up, cast.pack()) if tensor is not None)

    def _published(
        self, name: str, dtype: torch.dtype = torch.float32, *, compiled: bool = False, scaled: bool = False
    ) -> Variant:
        half = self.dtype if dtype == torch.float32 and self.dtype != torch.float32 else None
        step = PublishedStep(
            self._published_model().to(self.device, dtype),
            self.hidden,
            self.share,
            lr=self.config.lr,
            dropout=self.dropout,
            narrow=torch.float16 if scaled else half,
            compiled=compiled,
        )
        return Variant(
            name,
            step.judged,
            leaves=lambda _: step.leaves,
            counters=lambda: {
                name: mass.to(self.device) for name, mass in published_counters(step.items).items() if self.counted
            },
            reset=step.items.reset,
            tidy=step.tidy,
            holds=lambda: [*step.model.parameters(), *step.model.buffers()],
            compiled=compiled,
            like="published" if compiled else "",
            whole=step.train,
        )

    def _published_model(self) -> published.Recommender:
        dim, rank, experts = (self.sizes[letter] for letter in "DRE")
        model = published_model(self.modalities, dim, rank, experts, self.dropout)
        take_weights(model, self.weights)
        return model


class MeanStep(TrainingStep):
    """Every item has a row of its own at the first level."""

    operator, pooling = "training_step_mean", "mean"


class ClsStep(TrainingStep):
    """At the first level all items share a row."""

    operator, pooling = "training_step_cls", "cls"
