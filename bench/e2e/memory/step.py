"""The step whose memory is measured: forward and backward, or the whole step of an implementation that has one."""

from collections.abc import Callable

from torch import Tensor

from bench.core.benchmark import Implementation, Tensors, forward_backward


def step_function(built: Implementation, inputs: Tensors) -> Callable[[], list[Tensor]]:
    """Return a function that runs a step and returns its results and gradients: none for a whole training step."""

    def step() -> list[Tensor]:
        if built.whole_step is None:
            return forward_backward(built, inputs)
        built.whole_step(inputs)
        return []

    return step


def warm_up(built: Implementation, inputs: Tensors) -> None:
    """Run a step, so that the next one allocates nothing that is allocated only once, and free its gradients."""
    step_function(built, inputs)()
    if built.whole_step is not None:
        for leaf in built.leaves(inputs).values():
            leaf.grad = None
