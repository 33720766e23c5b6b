"""One level of a side network: a router over the backbone and a bank of bottleneck experts that grows and shrinks."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xsmoe.nn.optimizer import Carry, Optimizers, require_held, swap_parameter
from xsmoe.nn.top_k import top_k_mixture
from xsmoe_kernels import FrozenExperts, Utilization, side_moe

NewGate = Literal["random", "mean"]
EXPERT_STD = 0.01


@dataclass(frozen=True)
class Pruned:
    """An expert that was dropped: its index before the drop, its utilization share, and how many are left."""

    level: int
    expert: int
    share: float
    num_experts: int


@dataclass(frozen=True)
class Expanded:
    """A level after an expansion: all its experts, and how many of them are frozen."""

    level: int
    num_experts: int
    num_frozen: int


class ExpertBank(nn.Module):
    """A router and its experts: `y = g_0 * backbone + sum_e g_e * (x + GELU(x down_e^T) up_e)`, arXiv 2508.05993.

    Frozen experts come first and are buffers (`frozen_down`, `frozen_up`), trainable ones are parameters (`down`,
    `up`), so that an optimizer never sees the former. `router` has a row for the backbone, then one for every expert.
    A state dict carries the number of experts and the utilization, and loads into a bank of any other number.

    Args:
        dim: width D of the rows.
        rank: width R of an expert's bottleneck.
        num_experts: experts E at the start, all of them trainable.
        top_k: route each row to the backbone and its k best experts only; None mixes all of them.
    """

    router: nn.Parameter
    down: nn.Parameter
    up: nn.Parameter
    frozen_down: Tensor
    frozen_up: Tensor

    def __init__(self, dim: int, rank: int, num_experts: int = 1, top_k: int | None = None) -> None:
        super().__init__()
        for name, value in {"dim": dim, "rank": rank, "num_experts": num_experts}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None to mix all experts, not {top_k}")
        self.dim, self.rank, self.top_k = dim, rank, top_k
        self.count_in_eval = False
        self.router = nn.Parameter(torch.empty(num_experts + 1, dim))
        self.down = nn.Parameter(torch.empty(num_experts, rank, dim))
        self.up = nn.Parameter(torch.empty(num_experts, rank, dim))
        self.register_buffer("frozen_down", torch.empty(0, rank, dim))
        self.register_buffer("frozen_up", torch.empty(0, rank, dim))
        self.utilization = Utilization(num_experts, device=self.router.device)
        self._frozen: tuple[Tensor, Tensor, FrozenExperts] | None = None
        self.reset_parameters()

    @property
    def num_frozen(self) -> int:
        return self.frozen_down.shape[0]

    @property
    def num_experts(self) -> int:
        return self.num_frozen + self.down.shape[0]

    def reset_parameters(self) -> None:
        """Draws the published initial weights: experts N(0, 0.01^2), the router as `nn.Linear` does."""
        nn.init.normal_(self.down, std=EXPERT_STD)
        nn.init.normal_(self.up, std=EXPERT_STD)
        nn.init.uniform_(self.router, -1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def forward(self, x: Tensor, backbone: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Mixes the backbone's rows with the experts' outputs.

        Args:
            x: (N, D), or (1, D) where all rows are the same.
            backbone: (N, D), the frozen encoder's hidden states at this level.
            row_weight: (N,), how often each row counts in the utilization; default once.

        Returns:
            (N, D).
        """
        if self.top_k is not None:
            return top_k_mixture(self, x, backbone, row_weight, self._counters())
        return side_moe(**self.operands(x, backbone, row_weight))

    def operands(self, x: Tensor, backbone: Tensor, row_weight: Tensor | None = None) -> dict[str, Any]:
        """The arguments of `side_moe` for this bank, for callers that launch several banks at once."""
        return {
            "x": x,
            "backbone": backbone,
            "router": self.router,
            "down": self.down,
            "up": self.up,
            "frozen": self.frozen_experts(),
            "utilization": self._counters(),
            "row_weight": row_weight,
        }

    def expand(
        self,
        optimizer: Optimizers = None,
        *,
        new_gate: NewGate = "random",
        generator: torch.Generator | None = None,
        name: str = "bank",
    ) -> None:
        """Freezes all experts, adds one trainable expert that is their mean, and adds its gate row.

        Args:
            optimizer: swapped in place where given (see `swap_parameter`); the router's state is carried over.
            new_gate: "random" draws the row as `nn.Linear` does, so that the function jumps (as published); "mean"
                takes the mean of the experts' rows, which disturbs it less.
            generator: the source of the random row.
            name: what to call this bank in an error.
        """
        self.require_held(optimizer, name)
        with torch.no_grad():
            down, up = torch.cat([self.frozen_down, self.down]), torch.cat([self.frozen_up, self.up])
            if new_gate == "mean":
                row = self.router[1:].mean(0, keepdim=True)
            elif new_gate == "random":
                bound = 1 / math.sqrt(self.dim)
                row = torch.empty(1, self.dim).uniform_(-bound, bound, generator=generator).to(self.router)
            else:
                raise ValueError(f"new_gate must be 'random' or 'mean', not {new_gate!r}")
            self._replace(
                optimizer,
                "router",
                torch.cat([self.router, row]),
                lambda s: torch.cat([s, s.new_zeros(1, self.dim)]),
            )
            self._replace(optimizer, "down", down.mean(0, keepdim=True), None)
            self._replace(optimizer, "up", up.mean(0, keepdim=True), None)
            self.frozen_down, self.frozen_up = down, up
        self._recount()

    def prune(
        self, threshold: float = 0.1, optimizer: Optimizers = None, *, name: str = "bank"
    ) -> tuple[int, float] | None:
        """Drops the least used expert and its gate row if its share among the experts is below `threshold`.

        A bank of one expert, and one whose counters are empty, stays as it is.

        Returns:
            The dropped expert's index and its share, or None.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a share between 0 and 1, not {threshold}")
        shares = self.utilization.shares()
        expert = int(shares.argmin())
        share = float(shares[expert])
        if self.num_experts == 1 or not share < threshold:
            return None
        self.require_held(optimizer, name)
        trainable = expert - self.num_frozen
        with torch.no_grad():
            self._replace(optimizer, "router", _without(self.router, expert + 1), lambda s: _without(s, expert + 1))
            if trainable < 0:
                self.frozen_down, self.frozen_up = _without(self.frozen_down, expert), _without(self.frozen_up, expert)
            else:
                self._replace(optimizer, "down", _without(self.down, trainable), lambda s: _without(s, trainable))
                self._replace(optimizer, "up", _without(self.up, trainable), lambda s: _without(s, trainable))
        self._recount()
        return expert, share

    def require_held(self, optimizer: Optimizers, name: str = "bank") -> None:
        """Raises ValueError if an optimizer is given that lacks one of this bank's trainable parameters."""
        require_held(optimizer, {f"{name}.{key}": value for key, value in self.named_parameters()})

    def assign(self, router: Tensor, down: Tensor, up: Tensor, num_frozen: int = 0) -> None:
        """Takes over router (E + 1, D), down and up (E, R, D), of which the leading `num_frozen` experts are frozen."""
        weights = {"router": router, "frozen_down": down[:num_frozen], "frozen_up": up[:num_frozen]}
        weights |= {"down": down[num_frozen:], "up": up[num_frozen:]}
        counters = self.utilization.norm.new_zeros(router.shape[0])
        self.load_state_dict(weights | {"utilization.norm": counters, "utilization.gate": counters})

    def frozen_experts(self) -> FrozenExperts | None:
        """The frozen experts as `side_moe` takes them, with what is derived from them once; None without any."""
        if self.num_frozen == 0:
            return None
        # Moving the module replaces its buffers, and growth does too: what was built on the old ones is then stale.
        if self._frozen is None or self._frozen[0] is not self.frozen_down or self._frozen[1] is not self.frozen_up:
            self._frozen = self.frozen_down, self.frozen_up, FrozenExperts(self.frozen_down, self.frozen_up)
        return self._frozen[2]

    def extra_repr(self) -> str:
        experts = f"num_experts={self.num_experts}, num_frozen={self.num_frozen}, top_k={self.top_k}"
        return f"dim={self.dim}, rank={self.rank}, {experts}"

    def _counters(self) -> Utilization | None:
        return self.utilization if self.training or self.count_in_eval else None

    def _replace(self, optimizer: Optimizers, name: str, value: Tensor, carry: Carry | None) -> None:
        old = getattr(self, name)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        swap_parameter(optimizer, old, new, carry)
        setattr(self, name, new)

    def _recount(self) -> None:
        self.utilization = Utilization(self.num_experts, device=self.router.device)
        self._frozen = None

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpertBank":
        super()._apply(fn, recurse)
        self._frozen = None
        if self.utilization.norm.is_meta:
            self._recount()
        else:
            self.utilization.to(self.router.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}utilization.norm"] = self.utilization.norm
        destination[f"{prefix}utilization.gate"] = self.utilization.gate

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        counters = [f"{prefix}utilization.{part}" for part in ("norm", "gate")]
        self._resize(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._frozen = None
        if self.utilization.num_experts != self.num_experts:
            self._recount()
        for key, counter in zip(counters, (self.utilization.norm, self.utilization.gate), strict=True):
            if key in unexpected:
                unexpected.remove(key)
            if key not in state_dict:
                missing.append(key)
            elif state_dict[key].shape != counter.shape:
                found, needed = tuple(state_dict[key].shape), tuple(counter.shape)
                errors.append(f"{key} has shape {found}, but {self.num_experts} experts need {needed}")
            else:
                counter.copy_(state_dict[key])

    def _resize(self, state_dict: Any, prefix: str) -> None:
        for name in ("router", "down", "up", "frozen_down", "frozen_up"):
            value, mine = state_dict.get(prefix + name), getattr(self, name)
            if value is None or value.shape == mine.shape or value.shape[1:] != mine.shape[1:]:
                continue
            fresh = mine.new_empty(value.shape)
            setattr(self, name, nn.Parameter(fresh, mine.requires_grad) if isinstance(mine, nn.Parameter) else fresh)


def _without(rows: Tensor, index: int) -> Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]])
