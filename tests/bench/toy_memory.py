"""A workload whose bytes are known, for tests of `bench memory`; a process of its own imports it from here."""

import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.memory.sweeps import Swept
from bench.workload import Tensors, Variant, Work, Workload

COLUMNS = 1024


class Holding(torch.autograd.Function):
    """x * weight, and as many columns kept for backward as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, columns: int) -> Tensor:
        # Written to, or the system would not give it pages.
        ctx.save_for_backward(x, x.new_ones(len(x), columns))
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        x, _ = ctx.saved_tensors
        return None, (grad * x).sum(0), None


class Toy(Workload):
    """Variants that are right and known, wrong, dead, and broken."""

    operator: ClassVar[str] = "toy"
    letters: ClassVar[Mapping[str, Sequence[int]]] = {"N": (1024,), "E": (1, 2, 4)}

    @property
    def title(self) -> str:
        return "rows times weights"

    def variants(self) -> tuple[str, ...]:
        return "holding", "wrong", "compiled"

    def optional(self) -> tuple[str, ...]:
        return "killed", "broken"

    def draw(self) -> Tensors:
        return {"x": self.normal(self.sizes["N"], 8), "grad": self.normal(self.sizes["N"], 8)}

    def exact(self, rows: Tensors) -> Tensors:
        x, grad = rows["x"].double(), rows["grad"].double()
        return {"y": 2 * x, "weight": (grad * x).sum(0)}

    def reference(self) -> Variant:
        return self._variant("reference", 1.0)

    def build(self, name: str) -> Variant:
        if name == "killed":
            os._exit(9)
        if name == "broken":
            raise ZeroDivisionError("on purpose")
        return self._variant(name, 1.01 if name == "wrong" else 1.0)

    def kept(self, name: str) -> int | None:
        return 4 * self.sizes["N"] * self.sizes["E"] * COLUMNS if name == "holding" else None

    def work(self) -> Mapping[str, Work]:
        return {"forward": Work(), "backward": Work()}

    def _variant(self, name: str, factor: float) -> Variant:
        weight = torch.full((8,), 2.0, requires_grad=True)
        columns = self.sizes["E"] * COLUMNS

        def forward(rows: Tensors) -> Tensors:
            return {"y": factor * Holding.apply(rows["x"], weight, columns)}

        return Variant(name, forward, leaves=lambda _: {"weight": weight}, holds=lambda: [weight])


class House(ModuleType):
    """A package with one room."""

    @staticmethod
    def room(name: str) -> type[Workload]:
        return Toy


SWEPT = Swept(
    House("house"),
    "toy",
    centre={"N": 1024, "E": 2},
    values={"E": (1, 2, 4), "N": (512, 1024)},
    quick_values={"E": (1, 2)},
)
