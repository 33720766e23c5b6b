"""Support for torch.func: `vmap` runs operators element by element; `grad`, `vjp`, `jacrev` differentiate them once.

Forward mode raises, in eager and in compiled code: without a formula, torch would return tangents of zeros.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_unwrapped, is_batchedtensor, is_gradtrackingtensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def reject_forward_mode(operator: str) -> Any:
    """Raise NotImplementedError for an operator whose input has a tangent."""
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
    """Return an operator that torch.func can transform; without `setup_context` nothing is saved for `backward`."""

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
            return reject_forward_mode(name)

    Transformed.setup_context = staticmethod(setup_context or _save_nothing)  # type: ignore[method-assign]
    Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]

    def run(*inputs: Any) -> Any:
        # torch.func.functionalize supports operators only.
        stack = torch._C._functorch.get_interpreter_stack()
        if any(interpreter.key() == TransformType.Functionalize for interpreter in stack):
            return operator(*inputs)
        return Transformed.apply(*inputs)

    return run


class Registrations(torch.library.Library):
    """A library whose autograd kernels raise a clear error where torch.func does not support them."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", *, with_keyset: bool = False, **options: Any) -> None:
        def checked(keyset: Any, *arguments: Any) -> Any:
            # Costs nothing unless forward mode is on; a compiler inherits that from the code it traces.
            if forward_ad._current_level >= 0 and _carries_tangent(arguments):
                reject_forward_mode(op_name)
            try:
                return fn(keyset, *arguments)
            except RuntimeError as error:
                # torch's message about the autograd.Function that torch.library generated.
                if "setup_context" not in str(error) or not torch._C._are_functorch_transforms_active():
                    raise
                raise NotImplementedError(
                    f"{op_name}: torch.func.grad, vjp and jacrev differentiate calls of the public function in eager "
                    "code, not torch.ops and not traced code; take them out of the compiled function"
                ) from error

        assert dispatch_key == "Autograd"
        assert with_keyset
        super().impl(op_name, checked, dispatch_key, with_keyset=True, **options)


def add_in_place(adding: Callable[..., None], counters: Iterable[Tensor], increments: Iterable[Tensor]) -> None:
    """Call `adding` with counters, which are outside every transform, and with increments that no batch dimension has.

    Raises:
        NotImplementedError: each element of a batch has its own increments.
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
