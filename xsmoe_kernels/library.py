"""Registration of operators with `torch.library`, so that each op.py holds only what is its own."""

from collections.abc import Callable
from typing import Any

import torch

from xsmoe_kernels import dispatch


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Registers `xsmoe::name` for every device.

    Args:
        name: the operator's name, without the namespace.
        schema: arguments and results, functional; the first argument is a Tensor that tells device and dtype, the last
            is `str backend`, the backend that was requested.
        reference: the kernel in plain PyTorch; called without the `backend` argument.
        fake: shapes and dtypes of the results; called with every argument of the schema.
        check: called with the kernel's arguments before it, under torch.compile too, where the public function checks
            nothing, and on the meta device, where no kernel runs; raises on dtypes, shapes, devices and numbers that
            the kernel cannot take, and on bad values where `checks.values_visible` says that they may be read.
        setup_context, backward: as `torch.library.register_autograd` takes them.
    """
    qualified = f"xsmoe::{name}"
    dispatch.register(name, "reference", reference)

    def implementation(*arguments: Any) -> Any:
        *inputs, requested = arguments
        device, dtype = inputs[0].device, inputs[0].dtype
        if check is not None:
            check(*inputs)
        if _autocasts(device.type):
            # The kernel chose its precisions; autocast is still on below the dispatcher and would cast its products.
            with torch.autocast(device.type, enabled=False):
                return dispatch.run(name, requested, device, dtype, *inputs)
        return dispatch.run(name, requested, device, dtype, *inputs)

    def shapes(*arguments: Any) -> Any:
        # One tensor on meta brings an eager call here. A compiler comes here as well, but its sizes may be no numbers.
        if check is not None and any(isinstance(a, torch.Tensor) and a.device.type == "meta" for a in arguments):
            check(*arguments[:-1])
        return fake(*arguments)

    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(qualified)(shapes)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)


def define_backward(operator: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers `xsmoe::<operator>_backward`, which cannot be differentiated: trying raises RuntimeError.

    Args:
        operator: the forward operator's name, without the namespace.
        schema, reference, fake: as `define` takes them.
    """

    def refuse(*_: Any) -> Any:
        # Without a backward of its own torch would go on, with gradients that are silently wrong.
        raise RuntimeError(f"{operator} can be differentiated once, not twice")

    define(f"{operator}_backward", schema, reference=reference, fake=fake, backward=refuse)


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


def _autocasts(device_type: str) -> bool:
    # Asking is an error on meta, which has no autocast; torch's own test for that cannot be compiled in torch 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
