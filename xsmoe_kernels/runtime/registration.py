"""Registration of operators with `torch.library`, so that each op.py holds only what is its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from xsmoe_kernels.runtime import dispatch, functorch

_registrations = functorch.Registrations("xsmoe", "FRAGMENT")


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any] | None = None,
    each: str | None = None,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers `xsmoe::name` for every device.

    Args:
        name: the operator's name, without the namespace.
        schema: arguments and results, functional; the first argument is a Tensor, or a list of at least one, that tells
            device and dtype, the last is `str backend`, the backend that was requested.
        reference: the kernel in plain PyTorch; called without the `backend` argument.
        each: instead of a reference, the operator that this one is for each place of its lists.
        fake: shapes and dtypes of the results; called with every argument of the schema.
        check: called with the kernel's arguments before it, under torch.compile too, where the public function checks
            nothing, and on the meta device, where no kernel runs; raises on dtypes, shapes, devices and numbers that
            the kernel cannot take, and on bad values where `checks.values_visible` says that they may be read.
        setup_context, backward: as `torch.library.register_autograd` takes them.

    Returns:
        What the public function and other backwards call with the arguments of the schema: the operator, but that
        eager code gets an autograd that takes less time than torch.library's, and torch.func one that it can transform.
    """
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
            check(*inputs)
        # The kernel chose its precisions; autocast is still on below the dispatcher and would cast its products.
        with without_autocast(device.type):
            return dispatch.run(name, requested, device, dtype, *inputs)

    def shapes(*arguments: Any) -> Any:
        # One tensor on meta brings an eager call here. A compiler comes here as well, but its sizes may be no numbers.
        if check is not None and any(_on_meta(argument) for argument in arguments):
            check(*arguments[:-1])
        return fake(*arguments)

    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(qualified)(shapes)
    operator = getattr(torch.ops.xsmoe, name)
    if backward is None:
        return operator
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_registrations)
    eager = operator if setup_context is None else _eager_function(name, operator, setup_context, backward).apply
    transformed = functorch.function(name, operator, setup_context, backward)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*arguments)
        return (transformed if torch._C._are_functorch_transforms_active() else eager)(*arguments)

    return call


def define_backward(
    operator: str,
    schema: str,
    *,
    reference: Callable[..., Any] | None = None,
    each: str | None = None,
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Registers `xsmoe::<operator>_backward`, which cannot be differentiated: trying raises RuntimeError.

    Args:
        operator: the forward operator's name, without the namespace.
        schema, reference, each, fake: as `define` takes them.

    Returns:
        What the operator's backward calls.
    """

    def refuse(*_: Any) -> Any:
        # Without a backward of its own torch would go on, with gradients that are silently wrong.
        raise RuntimeError(f"{operator} can be differentiated once, not twice")

    return define(f"{operator}_backward", schema, reference=reference, each=each, fake=fake, backward=refuse)


def define_in_place(name: str, schema: str, implementation: Callable[..., None]) -> None:
    """Registers `xsmoe::name`, which changes arguments in place, returns nothing and has no gradient, for every device.

    Args:
        name: the operator's name, without the namespace.
        schema: arguments, those that change marked `(a!)`, and no result.
        implementation: runs on every device; compiled code calls it too, with real tensors.
    """
    qualified = f"xsmoe::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(qualified)(lambda *_: None)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch's own products cast theirs: float64 stays."""
    if not _autocasts(tensors[0].device.type):
        return tensors
    return tuple(t.to(autocast_dtype(t)) for t in tensors)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that `autocast` gives a tensor."""
    device = tensor.device.type
    if not _autocasts(device) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block in which autocast casts nothing, on any type of device."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else _UNCHANGED


def plain_eager() -> bool:
    """Whether an autograd.Function of our own serves: not to a compiler, nor to what torch.func makes of a function."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def last_backward(ctx: Any, grad: torch.Tensor) -> bool:
    """Whether a backward in plain eager code runs for the last time: what it saved for itself is then its to change.

    Not where torch.library's autograd runs, which has given that to its caller, nor in batches or under a mode.
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
    """An operator and its autograd, for eager code: torch.library's own sorts all arguments again in every call."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = operator(*inputs)
            ctx.in_eager_code = True
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def jvp(*_: Any) -> Any:
            return functorch.refuse_forward_mode(name)

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Eager


_UNCHANGED = nullcontext()


def _on_meta(argument: object) -> bool:
    if isinstance(argument, list | tuple):
        return any(map(_on_meta, argument))
    return isinstance(argument, torch.Tensor) and argument.device.type == "meta"


def _autocasts(device_type: str) -> bool:
    # Asking is an error on meta, which has no autocast; torch's own test for that cannot be compiled in torch 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
