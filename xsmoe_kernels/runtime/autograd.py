"""Autograd of a declared operator: what its forward saves, and the call of its backward operator."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xsmoe_kernels.runtime.declaration import Operator, pick


def derive(operator: Operator, backward_operator: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Return `setup_context` and `backward` of an operator, as `torch.library.register_autograd` accepts them.

    `backward_operator` is called with the arguments of `operator.backward()`, and only where the first output has a
    gradient.
    """
    layout = Layout(operator)
    wanted, needed = layout.wanted, layout.needed
    saved_inputs, saved_outputs, settings = layout.saved_inputs, layout.saved_outputs, layout.settings
    num_arguments = len(operator.inputs) + 1
    single_output, single_gradient = len(operator.outputs) == 1, len(wanted) == 1

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if single_output:
            ctx.save_for_backward(*saved_inputs(inputs))
        else:
            # Zeros for the gradients of the other outputs could be large tensors.
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*saved_inputs(inputs), *saved_outputs(output))
        ctx.settings = settings(inputs)
        ctx.backend = inputs[-1]

    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * num_arguments
        if grad is not None:
            arguments = layout.in_order(ctx.saved_tensors, ctx.settings)
            if single_gradient:
                gradients[wanted[0]] = backward_operator(grad, *arguments, ctx.backend)
                return tuple(gradients)
            needs = needed(ctx.needs_input_grad)
            found = backward_operator(grad, *arguments, *needs, ctx.backend)
            for place, need, gradient in zip(wanted, needs, found, strict=True):
                if need:
                    gradients[place] = gradient
        return tuple(gradients)

    return setup_context, backward


def gradient_shapes(backward: Operator) -> Callable[[Sequence[Any]], Any]:
    """Return the fake of a backward operator: each gradient is like its input, or empty where it is not needed."""
    names = backward.names
    inputs = pick([names.index(name) for name in backward.outputs])
    if f"need_{backward.outputs[0]}" not in names:
        return lambda arguments: _empty_like(*inputs(arguments))
    needed = pick([names.index(f"need_{name}") for name in backward.outputs])
    return lambda arguments: tuple(
        _empty_like(tensor, need) for tensor, need in zip(inputs(arguments), needed(arguments), strict=True)
    )


class Layout:
    """Where the arguments of an operator's backward come from.

    Attributes:
        wanted: the places of the differentiable inputs.
        needed: picks their entries of `ctx.needs_input_grad`.
        saved_inputs: picks the tensors that backward gets from the inputs.
        saved_outputs: picks the tensors that backward gets from the outputs.
        settings: picks what else backward gets from the inputs.
    """

    def __init__(self, operator: Operator) -> None:
        kept = [(place, one) for place, one in enumerate(operator.inputs) if one.backward]
        tensors = [(place, one.name) for place, one in kept if one.is_tensor]
        settings = [(place, one.name) for place, one in kept if not one.is_tensor]
        self.wanted = [place for place, one in enumerate(operator.inputs) if one.grad]
        self.needed = pick(self.wanted)
        self.saved_inputs = pick([place for place, _ in tensors])
        self.saved_outputs = pick([operator.outputs.index(name) for name in operator.saved])
        self.settings = pick([place for place, _ in settings])
        names = [*(name for _, name in tensors), *operator.saved, *(name for _, name in settings)]
        order = operator.backward().names[1 : 1 + len(names)]
        self._order = None if names == list(order) else pick([names.index(name) for name in order])

    def in_order(self, saved: Sequence[Any], settings: Sequence[Any]) -> Sequence[Any]:
        """Return what was saved and the settings in the order of the backward operator's arguments."""
        arguments = (*saved, *settings)
        return arguments if self._order is None else self._order(arguments)


def _empty_like(tensor: Tensor, need: bool = True) -> Tensor:
    return tensor.new_empty(tensor.shape if need else (0,))
