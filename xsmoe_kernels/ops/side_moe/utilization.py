"""Counters of how much a side level uses its backbone and each of its experts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from xsmoe_kernels.runtime import checks, functorch, registration
from xsmoe_kernels.runtime.profiler_ranges import named_range


class Utilization:
    """Sums over rows of gates and of gated outputs; `side_moe` adds to them in place, without a synchronization.

    Args:
        num_experts: E, the number of experts, at least 1.
        device: the device of the counters; torch's default device if None.

    Attributes:
        norm: (E+1,) float64, the sum over rows of `||g_0 h||` for the backbone, then of `||g_e f_e(x)||` for each
            expert (L2 norms of gated outputs, arXiv 2508.05993).
        gate: (E+1,) float64, the sum over rows of the gates.
    """

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        num_experts = checks.integer("num_experts", num_experts, 1)
        # Training could not change tensors in place that were made in inference mode.
        with torch.inference_mode(False):
            self.norm = torch.zeros(num_experts + 1, dtype=torch.float64, device=device)
            self.gate = torch.zeros(num_experts + 1, dtype=torch.float64, device=device)

    @property
    def num_experts(self) -> int:
        """E, the number of experts counted."""
        return self.norm.shape[0] - 1

    def reset(self) -> None:
        """Set all counters to zero."""
        self.norm.zero_()
        self.gate.zero_()

    def shares(self) -> Tensor:
        """Return each expert's share (E,) of all experts' norms, without the backbone; NaN if nothing was counted."""
        return self.norm[1:] / self.norm[1:].sum()

    def gate_shares(self) -> Tensor:
        """Return the backbone's and each expert's share (E+1,) of the gate sum; NaN if nothing was counted."""
        return self.gate / self.gate.sum()

    def add_(self, norm: Tensor, gate: Tensor) -> None:
        """Add increments of shape (E+1,), except during a backward.

        Activation checkpointing runs a forward a second time, inside backward, and its rows must not be counted twice.
        Any other forward inside a backward, such as one that a hook starts, is not counted either.

        Raises:
            ValueError: increments for another number of experts.
            NotImplementedError: under torch.func.vmap each element has its own increments.
        """
        adding = torch.ops.xsmoe.add_utilization
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            functorch.add_in_place(adding, (self.norm, self.gate), (norm, gate))
        else:
            adding(self.norm, self.gate, norm, gate)

    def to(self, device: torch.device | str) -> "Utilization":
        """Move the counters to `device`, in place, and return self."""
        with torch.inference_mode(False):
            self.norm = self.norm.to(device)
            self.gate = self.gate.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the counters, under "norm" and "gate"."""
        return {"norm": self.norm.clone(), "gate": self.gate.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the counters from a result of `state_dict`.

        Raises:
            KeyError: "norm" or "gate" is missing.
            ValueError: they count another number of experts.
        """
        for name in ("norm", "gate"):
            checks.tensor(f"state[{name!r}]", state[name], self.num_experts + 1)
        self.norm.copy_(state["norm"])
        self.gate.copy_(state["gate"])

    def __repr__(self) -> str:
        return f"Utilization(num_experts={self.num_experts}, device={str(self.norm.device)!r})"


def _add_utilization(norm: Tensor, gate: Tensor, norm_increment: Tensor, gate_increment: Tensor) -> None:
    checks.tensor("norm", norm_increment, norm.shape[0])
    checks.tensor("gate", gate_increment, gate.shape[0])
    # Decided at run time, not when it is traced: a compiled layer inside a checkpoint is traced once and runs twice.
    if torch._C._current_graph_task_id() == -1:
        with named_range("counters"):
            norm.add_(norm_increment)
            gate.add_(gate_increment)


registration.define_in_place(
    "add_utilization",
    "(Tensor(a!) norm, Tensor(b!) gate, Tensor norm_increment, Tensor gate_increment) -> ()",
    _add_utilization,
)
