"""Argument checks that `side_moe` and `sparse_side_moe` share."""

from torch import Tensor

from xsmoe_kernels.ops.side_moe import reference
from xsmoe_kernels.ops.side_moe.utilization import Utilization
from xsmoe_kernels.runtime import checks


def check_types(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    utilization: Utilization | None,
    row_weight: Tensor | None,
) -> None:
    """Check types and numbers of dimensions, which a public function relies on in eager mode."""
    checks.tensor("x", x, "N", "D")
    checks.tensor("backbone", backbone, "N", "D")
    checks.tensor("router", router, "E+1", "D")
    checks.tensor("down", down, "E", "R", "D")
    checks.tensor("up", up, "E", "R", "D")
    if utilization is not None:
        if not isinstance(utilization, Utilization):
            raise TypeError(f"utilization must be a Utilization or None, not {type(utilization).__name__}")
        counted, gated = utilization.num_experts, router.shape[0] - 1
        if counted != gated:
            raise ValueError(f"utilization counts {counted} experts, but router has rows for {gated}")
        checks.together({"x": x, "utilization": utilization.norm})
    if row_weight is not None:
        checks.tensor("row_weight", row_weight, "N")


def check_level(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    frozen_down: Tensor | None,
    frozen_up: Tensor | None,
    row_weight: Tensor | None,
    num_frozen: int,
    activation: str,
) -> None:
    """Check dtypes, shapes, devices and numbers after autocast, with the errors that the public functions document."""
    rows, dim = checks.floating("backbone", backbone, "N", "D").shape
    checks.floating("x", x, "N", dim)
    if x.shape[0] not in (1, rows):
        raise ValueError(f"x must have the {rows} rows of backbone, or a single row for all of them, not {x.shape[0]}")
    checks.floating("router", router, "E+1", dim)
    experts, rank, _ = checks.floating("down", down, "E", "R", dim).shape
    checks.floating("up", up, experts, rank, dim)
    held = f"{experts} experts"
    if frozen_down is not None:
        ahead, _, _ = checks.floating("frozen.down", frozen_down, "F", rank, dim).shape
        checks.floating("frozen.up", frozen_up, ahead, rank, dim)
        experts += ahead
        held = f"{experts} experts ({ahead} of them frozen)"
    if experts == 0:
        raise ValueError("down and up hold no expert, and frozen none either; give at least one")
    if router.shape[0] != experts + 1:
        raise ValueError(
            f"router must have {experts + 1} rows, one for the backbone and one for each of the {held}, "
            f"not {router.shape[0]}"
        )
    if frozen_down is not None and num_frozen != 0:
        raise ValueError(
            f"num_frozen must be 0 where frozen is given, not {num_frozen}: frozen holds the frozen experts"
        )
    checks.integer("num_frozen", num_frozen, 0, experts, bound="the number of experts")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, not {activation!r}")
    if row_weight is not None:
        checks.floating("row_weight", row_weight, rows)
    operands = {
        "x": x,
        "backbone": backbone,
        "router": router,
        "down": down,
        "up": up,
        "frozen.down": frozen_down,
        "frozen.up": frozen_up,
    }
    checks.together(operands | {"row_weight": row_weight})
    checks.same_dtype(operands)
