"""A training step of `xsmoe train`: hidden states from the store, both encoders, loss, backward, optimizer.

B users have eleven items each, drawn from I items. M modalities have hidden states of D numbers at three levels. Each
of the two side levels has E experts of rank R; all of them except the last one are frozen.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bench.core.benchmark import Benchmark, Implementation, Product, Tensors, Variant, Work
from bench.core.correctness import outcome
from bench.core.results import Role
from bench.e2e.models import BLOCKS, DROPOUT, LEVELS, OUT_DIM, PLACES, paper_model, set_dropout
from bench.e2e.non_differentiable import differentiable_users
from bench.e2e.step.our_step import ID_TABLE, OurStep, raise_capture_failed, step_input
from bench.e2e.step.paper_step import PaperStep
from bench.ops.side_moe import level_backward, level_forward
from bench.paper import model as paper
from bench.paper.parameter_names import copy_weights, our_counters, paper_counters
from xsmoe.encoders import HiddenStateStore, ItemFeatures, ModalitySpec
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.nn.conditioning import Condition
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.graph_steps import GraphedSteps
from xsmoe.stream.hidden_states.conditioned import ConditionedFeatures
from xsmoe.stream.precision import autocast
from xsmoe_kernels import use_backend

APPENDED_ROWS = 4096
REDRAWS = 20
"""Redraws of users near a non-differentiable point. Two are almost always enough."""


class TrainingStep(Benchmark):
    """A step, its loss and its gradients. The correctness check has no dropout, and the timed step has."""

    pooling: ClassVar[str]
    # Whether utilization is counted, as in every training step.
    counted: bool = True
    # Whether items have ID embeddings, and the rows of their table.
    with_ids: bool = False
    id_rows: int = 1_000_000
    # Whether the model conditions hidden states.
    conditioned: bool = False
    # Rate in the timed step.
    dropout: float = DROPOUT
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32, torch.bfloat16)
    # Two side levels, the projection, two blocks of attention and feed-forward layer, and the loss.
    chained_operators: ClassVar[int] = LEVELS + 1 + 2 * BLOCKS + 1
    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {
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

    def variants(self) -> list[Variant]:
        # Every level of the paper's formulation stacks all experts' outputs of all places, and the logits are square.
        places = self.sizes["B"] * PLACES
        stacks = self.sizes["M"] * (LEVELS + 4) * places * (self.sizes["E"] + 1) * self.sizes["D"] * 4.0
        published: dict[str, Any] = {"peak_estimate": stacks + 8.0 * 4.0 * places**2, "baseline": True}
        found = [Variant("published", Role.PAPER, self._paper, **published)]
        if self.on_cuda and self.dtype != torch.float32:
            found.append(
                Variant(
                    "published-autocast", Role.PAPER, lambda: self._paper(autocast_dtype=torch.float16), baseline=True
                )
            )
        compiled = {"compiled": True, "flop_like": "published", **published}
        found.append(Variant("compiled", Role.COMPILED, lambda: self._paper(compiled=True), **compiled))
        found.append(Variant("plain", Role.REFERENCE, lambda: self._ours("reference"), baseline=True))
        if self.on_cuda:
            found.append(Variant("ours-eager", Role.OURS, self._ours, baseline=True))
        found.append(Variant("ours", Role.OURS, self._ours_default, cuda_graph=self.on_cuda))
        # The ID table is zero in the check, so the results must equal those of a step without IDs.
        optional = {
            "ours-uncounted": self._uncounted,
            "ours-conditioned": lambda: self._changed(conditioned=True)._ours_default(),
            "ours-ids": lambda: self._changed(with_ids=True)._ours_default(),
        }
        return found + [
            Variant(name, Role.OURS, build, cuda_graph=self.on_cuda, default=False) for name, build in optional.items()
        ]

    def make_inputs(self) -> Tensors:
        items = self._draw_items(self.sizes["B"])
        if self.dtype == torch.float32:
            # Near a non-differentiable point, rounding alone decides the gradient. In 16 bits the reference is
            # affected in the same way.
            near = torch.arange(len(items))
            for _ in range(REDRAWS):
                near = near[self._near_non_differentiable(items[near])]
                if not len(near):
                    break
                items[near] = self._draw_items(len(near))
        return {"items": items, "grad": torch.ones((), device=self.device)}

    def exact(self, inputs: Tensors) -> Tensors:
        return outcome(self._paper(torch.float64), inputs)

    def reference(self) -> Implementation:
        return self._paper()

    def work(self) -> Mapping[str, Work]:
        dim, rank, experts, modalities, users = (self.sizes[letter] for letter in "DREMB")
        items, rows, size = self._distinct_items(), users * (PLACES - 1), self.dtype.itemsize
        forward, backward = Work(), Work()
        for level in range(LEVELS):
            entering = items if level or self.pooling == "mean" else 1
            for _ in range(modalities):
                forward += level_forward(entering, experts, dim, rank, size)
                backward += level_backward(entering, experts, dim, rank, size, trainable=1, need_x=level > 0)
        # The operands of the projection, the blocks and the logits are in cache, so only their FLOP count.
        inner = 4 * OUT_DIM
        rest = Work(
            2.0 * items * modalities * dim * OUT_DIM
            + BLOCKS * 2.0 * rows * OUT_DIM * (4 * OUT_DIM + 2 * inner)
            + 2.0 * rows * items * OUT_DIM
        )
        return {"forward": forward + rest, "backward": backward + rest + rest}

    def products(self) -> Sequence[Product]:
        rows, dim = self._distinct_items() * self.sizes["M"], self.sizes["D"]
        hidden = self.sizes["E"] * self.sizes["R"]
        # At small sizes the call dominates the time of a product. The last product is large enough.
        return Product(rows, dim, hidden), Product(rows, hidden, dim), Product(1024, 1024, 1024)

    def _draw_items(self, users: int) -> Tensor:
        return torch.randint(self.sizes["I"], (users, PLACES), generator=self.generator)

    def _distinct_items(self) -> int:
        """Return the mean number of distinct items in a batch."""
        places, items = self.sizes["B"] * PLACES, self.sizes["I"]
        return round(items * (1 - (1 - 1 / items) ** places))

    @cached_property
    def hidden(self) -> dict[str, Tensor]:
        """Return the content of the store: (I, levels, D) per modality. With [CLS] pooling all first rows are equal."""
        shape = self.sizes["I"], LEVELS + 1, self.sizes["D"]
        tables = {name: torch.randn(shape, generator=self.generator).to(self.dtype) for name in self.modalities}
        if self.pooling == "cls":
            for table in tables.values():
                table[:, 0] = table[0, 0]
        return tables

    @cached_property
    def store(self) -> HiddenStateStore:
        """Return a store of these hidden states on disk, as `xsmoe encode` writes it."""
        # The folder is removed together with this object.
        self._folder = tempfile.TemporaryDirectory(prefix="xsmoe-bench-")
        spec = ModalitySpec(self.sizes["D"], tuple(range(LEVELS + 1)), self.dtype, pooling=self.pooling)
        store = HiddenStateStore.create(self._folder.name, dict.fromkeys(self.modalities, spec))
        for first in range(0, self.sizes["I"], APPENDED_ROWS):
            rows = {name: table[first : first + APPENDED_ROWS] for name, table in self.hidden.items()}
            store.append([str(first + row) for row in range(len(rows[self.modalities[0]]))], rows)
        return store

    @cached_property
    def share(self) -> np.ndarray:
        """Return (I,) each item's share of the training interactions, by Zipf's law."""
        weight = 1 / (1 + torch.randperm(self.sizes["I"], generator=self.generator, dtype=torch.float64))
        return (weight / weight.sum()).numpy()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Return the initial state of all variants, under our names."""
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
            # The time of a step does not depend on the statistics. These change no bit of the hidden states.
            for level in conditioning.levels:
                level.varying, level.mean, level.factor = torch.ones(dim).bool(), torch.zeros(dim), torch.eye(dim)
        for _, _, bank in items.banks():
            # As large as trained experts, so that a missing expert changes the results.
            down, up = (scale * torch.randn(experts, rank, dim) for scale in (dim**-0.5, rank**-0.5))
            bank.assign(bank.router.detach(), down, up, experts - 1)
        return Recommender(items, UserEncoder(OUT_DIM, BLOCKS, dropout=self.dropout, max_length=PLACES - 1))

    def _near_non_differentiable(self, items: Tensor) -> Tensor:
        """Return (B,) bool, True for users near a non-differentiable point."""
        step = step_input(self._exact_model, self.store, items, np.log(self.share), torch.float64)
        return ~differentiable_users(self._exact_model, step).cpu()

    @cached_property
    def _exact_model(self) -> Recommender:
        model = self._recommender()
        model.load_state_dict(self.weights)
        model.to(self.device, torch.float64)
        set_dropout(model, 0.0)
        return model

    def _uncounted(self) -> Implementation:
        easier = self._changed(counted=False)
        return replace(easier._ours_default(), solves=easier)

    def _changed(self, **attributes: bool) -> "TrainingStep":
        """Return the same step, with the same items and weights, and other attributes."""
        changed = copy.copy(self)
        vars(changed).update(attributes, hidden=self.hidden, store=self.store, share=self.share, weights=self.weights)
        return changed

    def _ours_default(self) -> Implementation:
        return self._ours_captured() if self.on_cuda else self._ours()

    def _ours(self, backend: str = "auto") -> Implementation:
        step = self._our_step()

        def whole_step(inputs: Tensors) -> None:
            set_dropout(step.model, self.dropout)
            with use_backend(backend):
                step.train(step.input(inputs))

        return self._implementation(step, whole_step, backend)

    def _ours_captured(self) -> Implementation:
        """Return CUDA graphs of the check, without dropout and optimizer, and others of the timed step."""
        ours = self._our_step(captured=True)
        checked, timed = (GraphedSteps(ours.model, ours.optimizer, warn=raise_capture_failed) for _ in range(2))
        gradients = {key: torch.empty_like(leaf) for key, leaf in ours.leaves.items()}

        def loss_and_gradients(sent: StepInput) -> Tensor:
            step = ours.gathered(sent)
            ours.model.zero_grad(set_to_none=True)
            with autocast(self.config):
                loss: Tensor = ours.model(step.hidden, step.batch)
            loss.backward()
            for key, leaf in ours.leaves.items():
                assert leaf.grad is not None
                gradients[key].copy_(leaf.grad)
            return loss.detach()

        def check_step(inputs: Tensors) -> tuple[Tensors, Tensors]:
            set_dropout(ours.model, 0.0)
            loss = checked(loss_and_gradients, ours.sent_input(inputs))
            return {"y": loss}, gradients

        def whole_step(inputs: Tensors) -> None:
            set_dropout(ours.model, self.dropout)
            timed(ours.train, ours.sent_input(inputs))

        return replace(self._implementation(ours, whole_step, "auto"), prepare=lambda inputs: inputs, step=check_step)

    def _our_step(self, *, captured: bool = False) -> OurStep:
        model = self._recommender(ids=self.with_ids)
        table = {ID_TABLE: torch.zeros(self.id_rows, OUT_DIM)} if self.with_ids else {}
        model.load_state_dict(model.state_dict() | self.weights | table)
        features: ItemFeatures = self.store
        if self.conditioned:
            features = ConditionedFeatures(self.store, model.items)
        capacity = Capacity(self.sizes["B"], PLACES - 1) if captured else None
        ours = OurStep(model.to(self.device), features, self.share, replace(self.config, graph=captured), capacity)
        if not self.counted:
            for _, _, bank in model.items.banks():
                # A bank has no dropout, so this only stops counting.
                bank.eval()
        return ours

    def _implementation(self, ours: OurStep, whole_step: Callable[[Tensors], None], backend: str) -> Implementation:
        def forward(inputs: Tensors) -> Tensors:
            set_dropout(ours.model, 0.0)
            step = ours.input(inputs)
            with use_backend(backend), autocast(self.config):
                return {"y": ours.model(step.hidden, step.batch)}

        return Implementation(
            forward,
            leaves=lambda _: dict(ours.leaves),
            counters=lambda: our_counters(ours.model.items) if self.counted else {},
            reset=ours.model.items.reset_utilization,
            owned=lambda: [*ours.model.parameters(), *ours.model.buffers(), *self._derived_weights(ours.model)],
            flop={name: least.flop for name, least in self.work().items()},
            whole_step=whole_step,
        )

    def _derived_weights(self, model: Recommender) -> Iterator[Tensor]:
        """Yield tensors that are computed once from frozen weights: prepacked weights, and casts under autocast."""
        for _, _, bank in model.items.banks():
            if (frozen := bank.frozen_experts()) is not None:
                cast = frozen.to(self.dtype)
                yield from (tensor for tensor in (cast.down, cast.up, cast.pack()) if tensor is not None)

    def _paper(
        self, dtype: torch.dtype = torch.float32, *, compiled: bool = False, autocast_dtype: torch.dtype | None = None
    ) -> Implementation:
        if autocast_dtype is None and dtype == torch.float32 and self.dtype != torch.float32:
            autocast_dtype = self.dtype
        step = PaperStep(
            self._paper_model().to(self.device, dtype),
            self.hidden,
            self.share,
            lr=self.config.lr,
            dropout=self.dropout,
            autocast_dtype=autocast_dtype,
            compiled=compiled,
        )
        return Implementation(
            step.checked_loss,
            leaves=lambda _: step.leaves,
            # The paper's counters are on the host.
            counters=lambda: {
                name: mass.to(self.device) for name, mass in paper_counters(step.items).items() if self.counted
            },
            reset=step.items.reset,
            normalize=step.normalize,
            owned=lambda: [*step.model.parameters(), *step.model.buffers()],
            whole_step=step.train,
        )

    def _paper_model(self) -> paper.Recommender:
        dim, rank, experts = (self.sizes[letter] for letter in "DRE")
        model = paper_model(self.modalities, dim, rank, experts, self.dropout)
        copy_weights(model, self.weights)
        return model


class MeanStep(TrainingStep):
    """Each item has its own row at the first level."""

    operator, pooling = "training_step_mean", "mean"


class ClsStep(TrainingStep):
    """All items share one row at the first level."""

    operator, pooling = "training_step_cls", "cls"
