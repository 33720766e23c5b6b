"""Operators under torch.func: `vmap` runs them element by element, `grad`, `vjp` and `jacrev` differentiate them once.

Forward mode is refused, in plain eager code and in compiled code too: what torch makes of an operator without a formula
for it is a tangent of zeros.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_unwrapped, is_batchedtensor, is_gradtrackingtensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def refuse_forward_mode(operator: str) -> Any:
    """Raises what is said where an operator's input carries a tangent."""
    raise NotImplementedError(
        f"{operator}: forward-mode differentiation is not supported (torch.func.jvp, jacfwd, linearize and hessian, "
        "torch.autograd.forward_ad); use reverse mode: backward, or torch.func.grad, vjp or jacrev"
    )


def function(
    name: str,
    operator: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """An operator for code that torch.func transforms; without `setup_context` nothing is saved for `backward`."""

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return operator(*inputs)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
            if info.batch_size == 0:
                raise ValueError(f"{name} cannot run under torch.func.vmap over a dimension of size 0")
            each = [
                Transformed.apply(
                    *(
                        value.select(dim, place) if isinstance(value, Tensor) and dim is not None else value
                        for value, dim in zip(inputs, in_dims, strict=True)
                    )
                )
                for place in range(info.batch_size)
            ]
            if isinstance(each[0], Tensor):
                return torch.stack(each), 0
            return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0,) * len(each[0])

        @staticmethod
        def jvp(*_: Any) -> Any:
            return refuse_forward_mode(name)

    Transformed.setup_context = staticmethod(setup_context or _save_nothing)  # type: ignore[method-assign]
    Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]

    def run(*inputs: Any) -> Any:
        # torch.func.functionalize knows operators only.
        stack = torch._C._functorch.get_interpreter_stack()
        if any(interpreter.key() == TransformType.Functionalize for interpreter in stack):
            return operator(*inputs)
        return Transformed.apply(*inputs)

    return run


class Registrations(torch.library.Library):
    """Registers what torch.library makes of a backward, such that it says what it cannot do under torch.func."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", *, with_keyset: bool = False, **options: Any) -> None:
        def refusing(keyset: Any, *arguments: Any) -> Any:
            # Free but where forward mode is on, which a compiler takes over from what it traces.
            if forward_ad._current_level >= 0 and _carries_tangent(arguments):
                refuse_forward_mode(op_name)
            try:
                return fn(keyset, *arguments)
            except RuntimeError as error:
                # What torch says of the autograd.Function that it has made itself.
                if "setup_context" not in str(error) or not torch._C._are_functorch_transforms_active():
                    raise
                raise NotImplementedError(
                    f"{op_name}: torch.func.grad, vjp and jacrev differentiate calls of the public function in eager "
                    "code, not torch.ops and not what torch.compile traces; take them out of the compiled function"
                ) from error

        assert dispatch_key == "Autograd"
        assert with_keyset
        super().impl(op_name, refusing, dispatch_key, with_keyset=True, **options)


def add_in_place(adding: Callable[..., None], counters: Iterable[Tensor], increments: Iterable[Tensor]) -> None:
    """Calls `adding` with counters, which no transform knows, and increments, which must be the same for all of them.

    Raises:
        NotImplementedError: each element of a batch has increments of its own.
    """
    plain = []
    for increment in increments:
        while is_gradtrackingtensor(increment):
            increment = get_unwrapped(increment)
        if is_batchedtensor(increment):
            raise NotImplementedError(
                "utilization cannot count under torch.func.vmap; pass utilization=None, or call eval() of a module"
            )
        plain.append(increment)
    with temporarily_clear_interpreter_stack():
        adding(*counters, *plain)


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _carries_tangent(arguments: Iterable[Any]) -> bool:
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(arguments))


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)
