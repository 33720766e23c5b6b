"""List variant of a declared operator: one operator for several calls, with lists as arguments and results."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xsmoe_kernels.runtime import autograd, functorch, registration
from xsmoe_kernels.runtime.declaration import Operator, by_name, pick

Columns = Sequence[list[Any]]
"""The arguments of several calls: for each argument a list with an entry per call."""


class ListOperator:
    """`xsmoe::<name>`, which runs several calls of another operator, and its backward operator.

    Args:
        single: the declaration of the other operator.
        name: without the namespace.
        fake, check: of the other operator, as in `registration.define`.
        argument: what the public function calls the list of calls, for messages.
    """

    def __init__(
        self,
        single: Operator,
        name: str,
        *,
        fake: Callable[..., Any],
        check: Callable[..., None],
        argument: str,
    ) -> None:
        self.argument = argument
        self._check = by_name(check, single.names)
        declared = single.as_lists(name)
        backward_operator = registration.define_backward(declared.backward(), each=single.backward().name)
        setup_context, backward = _library_autograd(declared, backward_operator)
        registration.register(
            declared,
            each=single.name,
            fake=registration.for_each_call(by_name(fake, single.names)),
            check=self.check,
            setup_context=setup_context,
            backward=backward,
        )
        self._operator = getattr(torch.ops.xsmoe, name)
        self._eager = _eager_function(declared, self._operator, backward_operator)
        tensors, others = _split(single)
        self._tensors, self._settings = pick(tensors), pick(others)

    def __call__(self, columns: Columns, backend: str) -> Sequence[list[Tensor]]:
        """Run all calls; returns for each output a list with an entry per call."""
        if torch.compiler.is_compiling():
            outputs: Sequence[list[Tensor]] = self._operator(*columns, backend)
            return outputs
        calls = len(columns[0])
        tensors = [tensor for column in self._tensors(columns) for tensor in column]
        return _by_call(self._eager.apply(calls, backend, self._settings(columns), *tensors), calls)

    def check(self, columns: Columns) -> None:
        """Raise what the check of the other operator raises, with the place of the call in front of the message."""
        for place, inputs in enumerate(zip(*columns, strict=True)):
            with self.naming(place):
                self._check(inputs)

    def naming(self, place: int) -> "_Naming":
        """Return a block that puts the place of a call in front of the message of a TypeError or ValueError."""
        return _Naming(f"{self.argument}[{place}]: ")


class _Naming:
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind in (TypeError, ValueError):
            raise kind(f"{self._prefix}{error}") from error


def _split(operator: Operator) -> tuple[list[int], list[int]]:
    """Return the places of the tensors among an operator's inputs, and those of the others."""
    tensors = [place for place, one in enumerate(operator.inputs) if one.is_tensor]
    return tensors, [place for place in range(len(operator.inputs)) if place not in tensors]


def _by_call(flat: Sequence[Any], calls: int) -> list[list[Any]]:
    """Return lists of one entry per call, from all of them end to end."""
    return [list(flat[first : first + calls]) for first in range(0, len(flat), calls)]


def _save(layout: autograd.Layout, ctx: Any, inputs: Columns, output: Columns, backend: str) -> None:
    ctx.mark_non_differentiable(*(tensor for column in output[1:] for tensor in column))
    ctx.set_materialize_grads(False)
    columns = (*layout.saved_inputs(inputs), *layout.saved_outputs(output))
    ctx.save_for_backward(*(tensor for column in columns for tensor in column))
    ctx.calls, ctx.settings, ctx.backend = len(output[0]), layout.settings(inputs), backend


def _gradients(
    layout: autograd.Layout,
    backward: Callable[..., Any],
    ctx: Any,
    grads: Sequence[Tensor | None],
    needed: Sequence[Sequence[bool]],
) -> list[list[Tensor | None]]:
    """Return the gradients of the differentiable inputs; calls whose result has no gradient are left out."""
    places = [place for place, grad in enumerate(grads) if grad is not None and any(column[place] for column in needed)]
    gradients: list[list[Tensor | None]] = [[None] * ctx.calls for _ in needed]
    if places:
        arguments = layout.in_order(_by_call(ctx.saved_tensors, ctx.calls), ctx.settings)
        chosen = [[column[place] for place in places] for column in (grads, *arguments, *needed)]
        for gradient, need, tensors in zip(gradients, needed, backward(*chosen, ctx.backend), strict=True):
            for place, tensor in zip(places, tensors, strict=True):
                gradient[place] = tensor if need[place] else None
    return gradients


def _eager_function(
    declared: Operator, operator: Callable[..., Any], backward_operator: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """Return the operator for eager code, with flat arguments: torch.library's autograd is slow with lists."""
    layout = autograd.Layout(declared)
    tensor_places, other_places = _split(declared)
    order = [*tensor_places, *other_places]
    in_order = pick([order.index(place) for place in range(len(order))])
    wanted = [tensor_places.index(place) for place in layout.wanted]
    pick_wanted = pick(wanted)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, calls: int, backend: str, settings: Columns, *tensors: Tensor | None) -> Any:
            columns = in_order((*_by_call(tensors, calls), *settings))
            output = operator(*columns, backend)
            _save(layout, ctx, columns, output, backend)
            return tuple(tensor for column in output for tensor in column)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            columns: list[list[Tensor | None]] = [[None] * ctx.calls for _ in tensor_places]
            needed = pick_wanted(_by_call(ctx.needs_input_grad[3:], ctx.calls))
            found = _gradients(layout, backward_operator, ctx, grads[: ctx.calls], needed)
            for place, gradients in zip(wanted, found, strict=True):
                columns[place] = gradients
            return None, None, None, *(tensor for column in columns for tensor in column)

        @staticmethod
        def jvp(*_: Any) -> Any:
            return functorch.reject_forward_mode(declared.name)

    return Eager


def _library_autograd(
    declared: Operator, backward_operator: Callable[..., Any]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Return `setup_context` and `backward` for `torch.library.register_autograd`."""
    layout = autograd.Layout(declared)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Columns) -> None:
        _save(layout, ctx, inputs[:-1], output, inputs[-1])

    def backward(ctx: Any, grads: list[Tensor | None], *_: object) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        # torch treats an optional list without None as a list of tensors, whose gradients are a list.
        gradients: list[list[Tensor | None] | None] = [
            [None] * ctx.calls if isinstance(need, list) else None for need in needs
        ]
        found = _gradients(layout, backward_operator, ctx, grads, layout.needed(needs))
        for place, column in zip(layout.wanted, found, strict=True):
            gradients[place] = column
        return tuple(gradients)

    return setup_context, backward
