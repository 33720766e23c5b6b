"""Registration of declared operators with `torch.library`: kernels, shapes, checks and autograd."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from xsmoe_kernels.runtime import autograd, dispatch, functorch
from xsmoe_kernels.runtime.declaration import Operator, by_name

Arguments = Sequence[Any]
"""The arguments of an operator in the order of its inputs, without the backend."""

_registrations = functorch.Registrations("xsmoe", "FRAGMENT")


def define(
    operator: Operator,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None],
    reference_backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operator and, if it is differentiable, its backward operator, for every device.

    Args:
        operator: the declaration.
        reference: the kernel in plain PyTorch; called with the operator's inputs.
        fake: called with the inputs that its parameters name; returns empty results.
        check: called with the inputs that its parameters name, before the kernel, under torch.compile too, where the
            public function checks nothing, and on the meta device, where no kernel runs; raises on dtypes, shapes,
            devices and numbers that the kernel does not support, and on bad values where `checks.values_visible` allows
            a check to read them.
        reference_backward: the kernel of the backward operator in plain PyTorch; called with the inputs of
            `operator.backward()`.

    Returns:
        A function of the inputs and the backend for the public function: the operator, with an autograd that is faster
        than torch.library's in eager code, and one that torch.func can transform.
    """
    setup_context = backward = None
    if reference_backward is not None:
        setup_context, backward = autograd.derive(
            operator, define_backward(operator.backward(), reference=reference_backward)
        )
    return register(
        operator,
        reference=reference,
        fake=by_name(fake, operator.names),
        check=by_name(check, operator.names),
        setup_context=setup_context,
        backward=backward,
    )


def define_backward(
    operator: Operator, *, reference: Callable[..., Any] | None = None, each: str | None = None
) -> Callable[..., Any]:
    """Register a backward operator, which cannot be differentiated: trying raises RuntimeError.

    Args:
        operator: the declaration, as `Operator.backward` derives it.
        reference, each: as in `register`.

    Returns:
        A function of the inputs and the backend, for the operator's backward.
    """

    def reject(*_: Any) -> Any:
        # Without a backward torch would continue, with gradients that are wrong without an error.
        raise RuntimeError(f"{operator.name.removesuffix('_backward')} can be differentiated once, not twice")

    fake = autograd.gradient_shapes(operator)
    return register(
        operator,
        reference=reference,
        each=each,
        fake=for_each_call(fake) if operator.lists else fake,
        backward=reject,
    )


def register(
    operator: Operator,
    *,
    reference: Callable[..., Any] | None = None,
    each: str | None = None,
    fake: Callable[[Arguments], Any],
    check: Callable[[Arguments], None] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operator whose autograd is given.

    Args:
        operator: the declaration.
        reference: the kernel in plain PyTorch; called with the operator's inputs.
        each: instead of a reference, the operator to run for each entry of a list operator's lists.
        fake, check: as in `define`, but functions of all inputs in one sequence.
        setup_context, backward: as for `torch.library.register_autograd`.

    Returns:
        As `define`.
    """
    name = operator.name
    qualified = f"xsmoe::{name}"
    if each is not None:
        dispatch.register_list(name, each)
    else:
        assert reference is not None
        dispatch.register(name, "reference", reference)

    def implementation(*arguments: Any) -> Any:
        *inputs, requested = arguments
        first = inputs[0][0] if isinstance(inputs[0], list | tuple) else inputs[0]
        device, dtype = first.device, first.dtype
        if check is not None:
            check(inputs)
        # The kernel chooses its precisions. Autocast is still on below the dispatcher and would cast its products.
        with without_autocast(device.type):
            return dispatch.run(name, requested, device, dtype, *inputs)

    def shapes(*arguments: Any) -> Any:
        # Eager calls with a tensor on meta run this. A compiler runs it too, but its sizes may be symbols.
        if check is not None and any(_on_meta(argument) for argument in arguments):
            check(arguments[:-1])
        return fake(arguments[:-1])

    torch.library.define(qualified, operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(qualified)(shapes)
    registered = getattr(torch.ops.xsmoe, name)
    if backward is None:
        return registered
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_registrations)
    eager = registered if setup_context is None else _eager_function(name, registered, setup_context, backward).apply
    transformed = functorch.function(name, registered, setup_context, backward)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(*arguments)
        return (transformed if torch._C._are_functorch_transforms_active() else eager)(*arguments)

    return call


def for_each_call(function: Callable[[Arguments], Any]) -> Callable[[Arguments], tuple[list[Any], ...]]:
    """Return the function of a list operator's inputs that calls `function` for each entry of the lists."""

    def lists(columns: Arguments) -> tuple[list[Any], ...]:
        results = [function(inputs) for inputs in zip(*columns, strict=True)]
        return tuple(map(list, zip(*results, strict=True)))

    return lists


def define_in_place(name: str, schema: str, implementation: Callable[..., None]) -> None:
    """Register `xsmoe::name`, which changes arguments in place, returns nothing and has no gradient, for every device.

    Args:
        name: the operator's name, without the namespace.
        schema: arguments, with `(a!)` at those that change, and no result.
        implementation: runs on every device; compiled code calls it too, with real tensors.
    """
    qualified = f"xsmoe::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(qualified)(lambda *_: None)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast tensors to autocast's dtype where autocast is on, as torch casts the operands of products; not float64."""
    if not _autocasts(tensors[0].device.type):
        return tensors
    return tuple(t.to(autocast_dtype(t)) for t in tensors)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype to which `autocast` casts a tensor."""
    device = tensor.device.type
    if not _autocasts(device) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a block without autocast, on any device type."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else _UNCHANGED


def plain_eager() -> bool:
    """Return whether code runs eagerly: neither traced by a compiler nor transformed by torch.func."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def last_backward(ctx: Any, grad: torch.Tensor) -> bool:
    """Return whether a backward in plain eager code runs for the last time, so that it may overwrite saved tensors.

    False where torch.library's autograd runs, which returned those tensors to its caller, in batched gradients, and
    under a dispatch mode.
    """
    return (
        getattr(ctx, "in_eager_code", False)
        and plain_eager()
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def _eager_function(
    name: str, operator: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """Return an operator with autograd for eager code; torch.library's sorts all arguments again in every call."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = operator(*inputs)
            ctx.in_eager_code = True
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def jvp(*_: Any) -> Any:
            return functorch.reject_forward_mode(name)

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Eager


_UNCHANGED = nullcontext()


def _on_meta(argument: object) -> bool:
    if isinstance(argument, list | tuple):
        return any(map(_on_meta, argument))
    return isinstance(argument, torch.Tensor) and argument.device.type == "meta"


def _autocasts(device_type: str) -> bool:
    # The query raises on meta, which has no autocast; torch's own check for that cannot be compiled in torch 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
