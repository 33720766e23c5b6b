"""What is measured of a variant: forward and backward, or the whole step where there is more to it."""

from collections.abc import Callable

from torch import Tensor

from bench.workload import Tensors, Variant, both_passes


def step_of(variant: Variant, rows: Tensors) -> Callable[[], list[Tensor]]:
    """A step on these rows, which gives results and gradients: none, where it ends with an optimizer."""

    def step() -> list[Tensor]:
        if variant.whole is None:
            return both_passes(variant, rows)
        variant.whole(rows)
        return []

    return step


def warm_up(variant: Variant, rows: Tensors) -> None:
    """Runs a step, so that the next holds nothing that comes once, and lets its gradients go."""
    step_of(variant, rows)()
    if variant.whole is not None:
        for leaf in variant.leaves(rows).values():
            leaf.grad = None
