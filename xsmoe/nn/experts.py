"""One level of a side network: a router over the backbone and a bank of bottleneck experts that grows and shrinks."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xsmoe.nn.optimizer import SECOND_MOMENTS, Carry, Optimizers, require_held, resize_parameter, swap_parameter
from xsmoe.nn.top_k import top_k_mixture
from xsmoe_kernels import FrozenExperts, Utilization, checks, side_moe

NewGate = Literal["random", "mean"]
EXPERT_STD = 0.01
WEIGHTS = ("router", "frozen_down", "frozen_up", "down", "up")


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
    A state dict carries the number of experts and the utilization, and loads into a bank of any other number, whose
    parameters change their shape and stay the same objects, so that an optimizer goes on training them. If that has
    taken steps, load its state too, with `optimizer.load_state_dict`; its next step raises RuntimeError otherwise.

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
        dim, rank = checks.integer("dim", dim, 1), checks.integer("rank", rank, 1)
        num_experts = checks.integer("num_experts", num_experts, 1)
        self.dim, self.rank = dim, rank
        self.top_k = None if top_k is None else checks.integer("top_k", top_k, 1)
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

        Call it between optimizer steps: the parameters are replaced, and with them go their gradients, also those that
        are still being accumulated, and hooks that were registered on them.

        Args:
            optimizer: swapped in place where given (see `swap_parameter`); the router's state is carried over, and the
                new row gets the mean second moment of the experts' rows where the optimizer is of Adam's kind.
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
            self._replace(optimizer, "router", torch.cat([self.router, row]), _with_new_gate)
            self._replace(optimizer, "down", down.mean(0, keepdim=True), None)
            self._replace(optimizer, "up", up.mean(0, keepdim=True), None)
            self.frozen_down, self.frozen_up = down, up
        self._recount()

    def prune(
        self, threshold: float = 0.1, optimizer: Optimizers = None, *, name: str = "bank"
    ) -> tuple[int, float] | None:
        """Drops the least used expert and its gate row if its share among the experts is below `threshold`.

        A bank of one expert, and one whose counters are empty, stays as it is. Call it between optimizer steps, as
        `expand`.

        Returns:
            The dropped expert's index and its share, or None.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: the counters are not finite, the threshold is no share, or the optimizer cannot go on.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a share between 0 and 1, not {threshold}")
        self.require_held(optimizer, name)
        self.require_counted(name)
        shares = self.utilization.shares()
        expert = int(shares.argmin())
        share = float(shares[expert])
        if self.num_experts == 1 or not share < threshold:
            return None
        trainable = expert - self.num_frozen
        with torch.no_grad():
            self._replace(optimizer, "router", _without(self.router, expert + 1), lambda _, s: _without(s, expert + 1))
            if trainable < 0:
                self.frozen_down, self.frozen_up = _without(self.frozen_down, expert), _without(self.frozen_up, expert)
            else:
                self._replace(optimizer, "down", _without(self.down, trainable), lambda _, s: _without(s, trainable))
                self._replace(optimizer, "up", _without(self.up, trainable), lambda _, s: _without(s, trainable))
        self._recount()
        return expert, share

    def counts_are_finite(self) -> bool:
        """Whether the experts' counters are finite, so that they say who is used least. Waits for the device."""
        return bool(self.utilization.norm[1:].isfinite().all())

    def require_counted(self, name: str = "bank") -> None:
        """Raises ValueError if `prune` would have to choose by counters that are not finite."""
        if self.num_experts > 1 and not self.counts_are_finite():
            raise ValueError(
                f"{name}.utilization is not finite, because rows that are not were counted, so that nobody knows which "
                "expert is used least; call reset_utilization() (utilization.reset() of a bank alone), and prune after "
                "more steps on finite rows"
            )

    def require_held(self, optimizer: Optimizers, name: str = "bank") -> None:
        """Raises where an optimizer is given that cannot go on once this bank's trainable parameters are replaced."""
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

    def __getstate__(self) -> dict[str, Any]:
        # A copy's buffers are others than those that the pack of frozen experts was made of.
        return self.__dict__ | {"_frozen": None}

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
        if (contradiction := self._contradiction(state_dict, prefix)) is not None:
            errors.append(contradiction)
            return
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

    def _contradiction(self, state_dict: Any, prefix: str) -> str | None:
        """Why the bank would not hold together with what a state dict brings; None if it would."""
        given = _given(state_dict, prefix)
        rows = {name: given.get(name, getattr(self, name)).shape[0] for name in WEIGHTS}
        for down, up in (("down", "up"), ("frozen_down", "frozen_up")):
            if rows[down] != rows[up]:
                return f"{prefix}{down} holds {rows[down]} experts, but {prefix}{up} holds {rows[up]}"
        frozen, trainable = rows["frozen_down"], rows["down"]
        if rows["router"] != 1 + frozen + trainable or rows["router"] == 1:
            held = f"{prefix}frozen_down and {prefix}down hold {frozen} and {trainable} experts"
            wanted = "at least one is needed" if frozen + trainable == 0 else f"which need {1 + frozen + trainable}"
            return f"{prefix}router has {rows['router']} rows, but {held}, {wanted}"
        return None

    def _resize(self, state_dict: Any, prefix: str) -> None:
        given = _given(state_dict, prefix)
        if any(value.shape[1:] != getattr(self, name).shape[1:] for name, value in given.items()):
            # It is refused next, and the bank has to stay whole.
            return
        for name, value in given.items():
            mine = getattr(self, name)
            if value.shape != mine.shape and isinstance(mine, nn.Parameter):
                resize_parameter(mine, value.shape)
            elif value.shape != mine.shape:
                setattr(self, name, mine.new_empty(value.shape))


def _given(state_dict: Any, prefix: str) -> dict[str, Tensor]:
    """A bank's weights in a state dict, less what torch refuses because it is none."""
    found = {name: state_dict.get(prefix + name) for name in WEIGHTS}
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.dim()}


def _with_new_gate(name: str, state: Tensor) -> Tensor:
    """A router's state in an optimizer, with a row for one more expert."""
    if name in SECOND_MOMENTS:
        # Adam corrects them for the step count, which all rows share: zeros beside a high one would say that gradients
        # have always been tiny, and make the row's first steps several times the learning rate.
        return torch.cat([state, state[1:].mean(0, keepdim=True)])
    return torch.cat([state, torch.zeros_like(state[:1])])


def _without(rows: Tensor, index: int) -> Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]])
