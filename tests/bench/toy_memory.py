"""A benchmark with known bytes for tests of `bench memory`. Processes of `resident_growth` import it from here."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from bench.core.benchmark import Benchmark, Implementation, Tensors, Variant, Work
from bench.core.results import Role
from bench.e2e.memory.sweeps import Swept

COLUMNS = 1024


class SaveColumns(torch.autograd.Function):
    """x * weight, which saves a number of columns for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, columns: int) -> Tensor:
        # The system allocates pages only when they are written.
        ctx.save_for_backward(x, x.new_ones(len(x), columns))
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        x, _ = ctx.saved_tensors
        return None, (grad * x).sum(0), None


class Toy(Benchmark):
    """Variants that are right, wrong, killed and broken."""

    operator: ClassVar[str] = "toy"
    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"N": (1024,), "E": (1, 2, 4)}

    @property
    def title(self) -> str:
        return "rows times weights"

    def variants(self) -> list[Variant]:
        saved = 4 * self.sizes["N"] * self.sizes["E"] * COLUMNS
        return [
            Variant("holding", Role.OURS, self.reference, expected_saved_bytes=saved),
            Variant("wrong", Role.EAGER, partial(self._implementation, 1.01)),
            Variant("compiled", Role.COMPILED, self.reference, compiled=True),
            Variant("killed", Role.OURS, partial(os._exit, 9), default=False),
            Variant("broken", Role.OURS, _fail, default=False),
        ]

    def make_inputs(self) -> Tensors:
        return {"x": self.normal(self.sizes["N"], 8), "grad": self.normal(self.sizes["N"], 8)}

    def exact(self, inputs: Tensors) -> Tensors:
        x, grad = inputs["x"].double(), inputs["grad"].double()
        return {"y": 2 * x, "weight": (grad * x).sum(0)}

    def reference(self) -> Implementation:
        return self._implementation(1.0)

    def work(self) -> Mapping[str, Work]:
        return {"forward": Work(), "backward": Work()}

    def _implementation(self, factor: float) -> Implementation:
        weight = torch.full((8,), 2.0, requires_grad=True)
        columns = self.sizes["E"] * COLUMNS

        def forward(inputs: Tensors) -> Tensors:
            return {"y": factor * SaveColumns.apply(inputs["x"], weight, columns)}

        return Implementation(forward, leaves=lambda _: {"weight": weight}, owned=lambda: [weight])


def _fail() -> NoReturn:
    raise ZeroDivisionError("on purpose")


SWEPT = Swept(
    {"toy": f"{__name__}:Toy"},
    "toy",
    centre={"N": 1024, "E": 2},
    values={"E": (1, 2, 4), "N": (512, 1024)},
    quick_values={"E": (1, 2)},
)
