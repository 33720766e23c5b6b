"""One level of a side network: a router and a bank of bottleneck experts. Experts can be added and removed."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xsmoe.nn.expert_state import mismatch, resize
from xsmoe.nn.gate_offset import widened, with_offset
from xsmoe.nn.merging import merge_into_nearest
from xsmoe.nn.optimizer import SECOND_MOMENTS, Carry, Optimizers, require_held, swap_parameter
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, sparse_side_moe
from xsmoe_kernels.runtime import checks

NewGate = Literal["random", "mean", "copy"]
PruneRule = Literal["drop", "merge"]
EXPERT_STD = 0.01


@dataclass(frozen=True)
class Pruned:
    """An expert that was dropped.

    Attributes:
        level: its side level.
        expert: its index before the drop.
        share: its utilization share.
        num_experts: number of experts after the drop.
        into: the index, before the drop, of the expert that it was merged into; None if it was not merged.
    """

    level: int
    expert: int
    share: float
    num_experts: int
    into: int | None = None


@dataclass(frozen=True)
class Expanded:
    """A level after an expansion: its number of experts, and how many of them are frozen."""

    level: int
    num_experts: int
    num_frozen: int


class ExpertBank(nn.Module):
    """A router and its experts: `y = g_0 * backbone + sum_e g_e * (x + GELU(x down_e^T) up_e)`, arXiv 2508.05993.

    Frozen experts come first. They are buffers (`frozen_down`, `frozen_up`), so no optimizer receives them. Trainable
    experts are parameters (`down`, `up`). `router` has a row for the backbone, then one for every expert. `gate_offset`
    (E + 1,) is added to the gates' logits. Until a split or a merge needs it, it is None and in no state dict.

    A state dict contains the number of experts and the utilization. It loads into a bank with any number of experts:
    the parameters change their shape but stay the same objects, so an optimizer continues to train them. If the
    optimizer has already taken steps, load its state too, with `optimizer.load_state_dict`. Otherwise its next step
    raises RuntimeError.

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
    gate_offset: Tensor | None

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
        self.register_buffer("gate_offset", None)
        self.utilization = Utilization(num_experts, device=self.router.device)
        self._frozen: tuple[Tensor, Tensor, tuple[int, int] | None, FrozenExperts] | None = None
        self.reset_parameters()

    @property
    def num_frozen(self) -> int:
        return self.frozen_down.shape[0]

    @property
    def num_experts(self) -> int:
        return self.num_frozen + self.down.shape[0]

    def reset_parameters(self) -> None:
        """Draw the published initial weights: experts from N(0, 0.01^2), the router as `nn.Linear` does."""
        nn.init.normal_(self.down, std=EXPERT_STD)
        nn.init.normal_(self.up, std=EXPERT_STD)
        nn.init.uniform_(self.router, -1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def forward(self, x: Tensor, backbone: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Mix the backbone's rows with the experts' outputs.

        Args:
            x: (N, D), or (1, D) if all rows are equal.
            backbone: (N, D), the frozen encoder's hidden states at this level.
            row_weight: (N,), how often each row counts in the utilization; default once.

        Returns:
            (N, D).
        """
        if self.top_k is not None:
            return sparse_side_moe(
                x,
                backbone,
                self.router,
                torch.cat([self.frozen_down, self.down]),
                torch.cat([self.frozen_up, self.up]),
                top_k=self.top_k,
                num_frozen=self.num_frozen,
                gate_offset=self.gate_offset,
                utilization=self._counters(),
                row_weight=row_weight,
            )
        return self.own_columns(side_moe(**self.operands(x, backbone, row_weight)))

    def operands(self, x: Tensor, backbone: Tensor, row_weight: Tensor | None = None) -> dict[str, Any]:
        """Return the arguments of `side_moe` for this bank, for callers that launch several banks at once.

        Pass the result of `side_moe` to `own_columns`.
        """
        operands = {
            "x": x,
            "backbone": backbone,
            "router": self.router,
            "down": self.down,
            "up": self.up,
            "frozen": self.frozen_experts(),
            "utilization": self._counters(),
            "row_weight": row_weight,
        }
        return operands if self.gate_offset is None else with_offset(operands, self.gate_offset)

    def own_columns(self, mixed: Tensor) -> Tensor:
        """Return the bank's output (N, D) from a result of `side_moe`, which is wider if the gates have an offset."""
        return mixed if self.gate_offset is None else mixed[:, : self.dim]

    def expand(
        self,
        optimizer: Optimizers = None,
        *,
        new_gate: NewGate = "random",
        generator: torch.Generator | None = None,
        name: str = "bank",
    ) -> None:
        """Freeze all experts and add one trainable expert, by default their mean, with its gate row.

        Call it between optimizer steps. It replaces the parameters, so their gradients (including accumulated ones) and
        the hooks on them are lost.

        Args:
            optimizer: the optimizer whose parameters are replaced in place (see `swap_parameter`), or None. The
                router's state is kept. In an optimizer of the Adam family, the new row gets the mean second moment of
                the experts' rows.
            new_gate: the new gate row. "random" draws it as `nn.Linear` does, which changes the function (as
                published). "mean" is the mean of the experts' rows, which changes the function less. "copy" splits the
                expert with the largest gate mass: the new expert is a copy of it, and each gets half of its gate, so
                the function does not change.
            generator: the source of the random row.
            name: the name of this bank in error messages.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: `new_gate` is unknown, or is "copy" although `top_k` is set; or the optimizer does not support
                the replacement (see `require_held`).
        """
        if new_gate not in get_args(NewGate):
            raise ValueError(f"new_gate must be one of {', '.join(get_args(NewGate))}, not {new_gate!r}")
        if new_gate == "copy" and self.top_k is not None:
            raise ValueError(
                f"new_gate must be 'random' or 'mean' if top_k is set, not 'copy': an expert and its copy would use two"
                f" of the top {self.top_k} experts, which changes the function"
            )
        self.require_held(optimizer, name)
        with torch.no_grad():
            down, up = torch.cat([self.frozen_down, self.down]), torch.cat([self.frozen_up, self.up])
            offset = self.gate_offset
            if new_gate == "copy":
                most = int(self.utilization.gate[1:].argmax())
                new_down, new_up = down[most : most + 1].clone(), up[most : most + 1].clone()
                row, offset = self.router[most + 1 : most + 2], self.offsets()
                offset[most + 1] -= math.log(2)
                new_offset = offset[most + 1 : most + 2]
            else:
                new_down, new_up = down.mean(0, keepdim=True), up.mean(0, keepdim=True)
                row, new_offset = self._new_row(new_gate, generator), self.router.new_zeros(1)
            self._replace(optimizer, "router", torch.cat([self.router, row]), _with_new_gate)
            self._replace(optimizer, "down", new_down, None)
            self._replace(optimizer, "up", new_up, None)
            self.frozen_down, self.frozen_up = down, up
            self.gate_offset = None if offset is None else torch.cat([offset, new_offset])
        self._recount()

    def _new_row(self, new_gate: NewGate, generator: torch.Generator | None) -> Tensor:
        if new_gate == "mean":
            return self.router[1:].mean(0, keepdim=True)
        bound = 1 / math.sqrt(self.dim)
        return torch.empty(1, self.dim).uniform_(-bound, bound, generator=generator).to(self.router)

    def offsets(self) -> Tensor:
        """Return a copy of the gates' offsets, (E + 1,), zeros if there are none."""
        return self.router.new_zeros(self.num_experts + 1) if self.gate_offset is None else self.gate_offset.clone()

    def prune(
        self,
        threshold: float = 0.1,
        optimizer: Optimizers = None,
        *,
        rule: PruneRule = "drop",
        name: str = "bank",
    ) -> tuple[int, float, int | None] | None:
        """Drop the least used expert and its gate row if its share among the experts is below `threshold`.

        A bank with one expert, or with empty counters, does not change. The other experts keep their counters. Call
        this method between optimizer steps, as `expand`.

        Args:
            threshold: a share of the experts' utilization, from 0 to 1.
            optimizer: as in `expand`.
            rule: "drop" removes the expert (as published). "merge" first merges it into the expert with the nearest
                weights: that expert gets the mean of both, weighted by their shares, the mean of their gate rows and
                the sum of their gates. If both experts are equal, the function does not change.
            name: the name of this bank in error messages.

        Returns:
            The dropped expert's index, its share, and the index of the expert that it was merged into (None if it was
            not merged), all as they were before the drop. None if no expert was dropped.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: the counters are not finite, the threshold is not between 0 and 1, the rule is unknown, or the
                optimizer does not support the replacement (see `require_held`).
        """
        if rule not in get_args(PruneRule):
            raise ValueError(f"rule must be one of {', '.join(get_args(PruneRule))}, not {rule!r}")
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
        into, counts = None, [self.utilization.norm, self.utilization.gate]
        with torch.no_grad():
            if rule == "merge":
                into = merge_into_nearest(self, expert, shares)
                for count in counts:
                    count[into + 1] += count[expert + 1]
            if self.gate_offset is not None:
                self.gate_offset = _without(self.gate_offset, expert + 1)
            self._replace(optimizer, "router", _without(self.router, expert + 1), lambda _, s: _without(s, expert + 1))
            if trainable < 0:
                self.frozen_down, self.frozen_up = _without(self.frozen_down, expert), _without(self.frozen_up, expert)
            else:
                self._replace(optimizer, "down", _without(self.down, trainable), lambda _, s: _without(s, trainable))
                self._replace(optimizer, "up", _without(self.up, trainable), lambda _, s: _without(s, trainable))
        self._recount()
        # Keep the counters: a split in the same window needs the most used expert.
        for mine, count in zip((self.utilization.norm, self.utilization.gate), counts, strict=True):
            mine.copy_(_without(count, expert + 1))
        return expert, share, into

    def counts_are_finite(self) -> bool:
        """Return whether the experts' counters are finite. Only then they identify the least used expert.

        On a GPU this synchronizes.
        """
        return bool(self.utilization.norm[1:].isfinite().all())

    def require_counted(self, name: str = "bank") -> None:
        """Raise ValueError if `prune` would have to use counters that are not finite."""
        if self.num_experts > 1 and not self.counts_are_finite():
            raise ValueError(
                f"{name}.utilization is not finite, because it counted rows that are not finite, so the least used "
                "expert is unknown; call reset_utilization() (or utilization.reset() of a single bank) and prune after "
                "more steps on finite rows"
            )

    def require_held(self, optimizer: Optimizers, name: str = "bank") -> None:
        """Raise if an optimizer is given that does not support replacing this bank's trainable parameters."""
        require_held(optimizer, {f"{name}.{key}": value for key, value in self.named_parameters()})

    def assign(self, router: Tensor, down: Tensor, up: Tensor, num_frozen: int = 0) -> None:
        """Copy router (E + 1, D), down and up (E, R, D) into the bank; the first `num_frozen` experts become frozen."""
        weights = {"router": router, "frozen_down": down[:num_frozen], "frozen_up": up[:num_frozen]}
        weights |= {"down": down[num_frozen:], "up": up[num_frozen:]}
        counters = self.utilization.norm.new_zeros(router.shape[0])
        self.load_state_dict(weights | {"utilization.norm": counters, "utilization.gate": counters})

    def frozen_experts(self) -> FrozenExperts | None:
        """Return the frozen experts in the form that `side_moe` uses, or None if there are none.

        The form is cached, because it contains tensors that are derived from the weights.
        """
        if self.num_frozen == 0:
            return None
        down, up, wide = self.frozen_down, self.frozen_up, self.gate_offset is not None
        versions = _versions(down, up) if wide else None
        # Growth and moving the module replace the buffers. The cached form of the old buffers is stale then.
        kept = self._frozen
        replaced = kept is not None and (kept[0] is not down or kept[1] is not up)
        # Widened experts are copies, so changes in place do not reach them: compare the versions.
        if kept is None or replaced or (wide and (versions is None or kept[2] != versions)):
            self._frozen = kept = (down, up, versions, widened(down, up) if wide else FrozenExperts(down, up))
        return kept[3]

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
        # The cached frozen experts belong to this bank's buffers. A copy has other buffers.
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
        if (why := mismatch(self, state_dict, prefix)) is not None:
            errors.append(why)
            return
        resize(self, state_dict, prefix)
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


def _with_new_gate(name: str, state: Tensor) -> Tensor:
    """Return a router's optimizer state with a row for one more expert."""
    if name in SECOND_MOMENTS:
        # Adam's bias correction uses one step count for all rows. With a high step count, zeros would mean that all
        # gradients were tiny, and the row's first steps would be several times the learning rate.
        return torch.cat([state, state[1:].mean(0, keepdim=True)])
    return torch.cat([state, torch.zeros_like(state[:1])])


def _versions(down: Tensor, up: Tensor) -> tuple[int, int] | None:
    """Return the version counters of both tensors; None if autograd does not count versions here."""
    if torch.compiler.is_compiling() or down.is_inference() or up.is_inference():
        return None
    return down._version, up._version


def _without(rows: Tensor, index: int) -> Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]])
