"""The side network of one modality: a ladder of expert banks beside a frozen encoder."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from xsmoe.nn.experts import Expanded, ExpertBank, NewGate, Pruned, PruneRule
from xsmoe.nn.optimizer import Optimizers
from xsmoe.nn.pretrained import Pretrained
from xsmoe_kernels import side_moe_group
from xsmoe_kernels.runtime import checks

Hidden = Tensor | Sequence[Tensor]


class SideMoE(Pretrained):
    """Climbs the chosen levels of a frozen encoder: `x_0 = h_0`, `x_l = bank_l(x_{l-1}, h_l)`, arXiv 2508.05993.

    Args:
        dim: width D of the hidden states.
        rank: width of an expert's bottleneck.
        num_levels: side levels, one fewer than the hidden states that go in (level 0 is the input).
        num_experts: experts at the start, one number or one for every side level.
        top_k: route each row to its k best experts only; None mixes all (as published).
    """

    def __init__(
        self, dim: int, rank: int, num_levels: int, num_experts: int | Sequence[int] = 1, top_k: int | None = None
    ) -> None:
        super().__init__()
        self.num_levels = num_levels = checks.integer("num_levels", num_levels, 1)
        counts = list(num_experts) if isinstance(num_experts, Iterable) else [num_experts] * num_levels
        if len(counts) != num_levels:
            raise ValueError(f"num_experts must be one number or {num_levels} of them, one a level, not {counts}")
        self.banks = nn.ModuleList(ExpertBank(dim, rank, count, top_k) for count in counts)
        first = self.levels()[0]
        self.dim, self.rank, self.top_k = first.dim, first.rank, first.top_k

    def config(self) -> dict[str, object]:
        return {"dim": self.dim, "rank": self.rank, "num_levels": self.num_levels, "top_k": self.top_k}

    def levels(self) -> list[ExpertBank]:
        """The expert banks, from the lowest level up."""
        return [bank for bank in self.banks if isinstance(bank, ExpertBank)]

    @property
    def num_experts(self) -> list[int]:
        """Experts of every level."""
        return [bank.num_experts for bank in self.levels()]

    def forward(self, hidden: Hidden, *, row_weight: Tensor | None = None) -> Tensor:
        """Encodes N items.

        Args:
            hidden: (N, levels + 1, D), or a sequence of levels, each (N, D) or (1, D) where all items share the row.
            row_weight: (N,), how often each item counts in the utilization; default once.

        Returns:
            (N, D).

        Raises:
            TypeError, ValueError: `hidden` has other levels or widths than this network.
        """
        return climb({"hidden": self}, {"hidden": hidden}, row_weight)["hidden"]

    def expand(
        self, optimizer: Optimizers = None, *, new_gate: NewGate = "random", generator: torch.Generator | None = None
    ) -> list[Expanded]:
        """Freezes all experts, adds one to every level (see `ExpertBank.expand`), and returns them as they are."""
        self._require_held(optimizer)
        done = []
        for level, bank in enumerate(self.levels()):
            bank.expand(optimizer, new_gate=new_gate, generator=generator, name=f"banks.{level}")
            done.append(Expanded(level, bank.num_experts, bank.num_frozen))
        return done

    def prune(self, threshold: float = 0.1, optimizer: Optimizers = None, *, rule: PruneRule = "drop") -> list[Pruned]:
        """Drops at most one little-used expert from every level (see `ExpertBank.prune`). Returns what was dropped."""
        self._require_held(optimizer)
        for level, bank in enumerate(self.levels()):
            bank.require_counted(f"banks.{level}")
        done = []
        for level, bank in enumerate(self.levels()):
            if dropped := bank.prune(threshold, optimizer, rule=rule, name=f"banks.{level}"):
                expert, share, into = dropped
                done.append(Pruned(level, expert, share, bank.num_experts, into))
        return done

    def _require_held(self, optimizer: Optimizers) -> None:
        for level, bank in enumerate(self.levels()):
            bank.require_held(optimizer, f"banks.{level}")

    @classmethod
    def from_ladder(cls, state_dict: Mapping[str, Tensor], *, num_frozen: int = 0) -> "SideMoE":
        """Builds the network from the weights of the published module.

        Args:
            state_dict: `moes.i.experts.j.fc_down.weight` (R, D), `moes.i.experts.j.fc_up.weight` (D, R) and
                `routers.i.linear.weight` (E + 1, D), the backbone's row first. Other keys are refused.
            num_frozen: experts of every level that become frozen; the published module does not record it.

        Raises:
            ValueError: a key is missing, unknown or of another shape.
        """
        remaining = dict(state_dict)

        def take(key: str, *shape: int) -> Tensor:
            if key not in remaining:
                raise ValueError(f"state_dict lacks {key!r}; it has {', '.join(sorted(state_dict)) or 'no keys'}")
            value = remaining.pop(key)
            if shape and tuple(value.shape) != shape:
                raise ValueError(f"{key} must have shape {shape}, not {tuple(value.shape)}")
            return value

        levels: list[tuple[Tensor, Tensor, Tensor]] = []
        dim = rank = 0
        while f"routers.{len(levels)}.linear.weight" in remaining or not levels:
            level = len(levels)
            router = take(f"routers.{level}.linear.weight")
            if not levels:
                first = take("moes.0.experts.0.fc_down.weight")
                (rank, dim), remaining["moes.0.experts.0.fc_down.weight"] = first.shape, first
            experts = router.shape[0] - 1
            if tuple(router.shape) != (experts + 1, dim) or experts < 1 or not 0 <= num_frozen <= experts:
                raise ValueError(
                    f"routers.{level}.linear.weight has shape {tuple(router.shape)}; expected (E + 1, {dim}) with E at "
                    f"least 1 and num_frozen = {num_frozen}"
                )
            keys = [f"moes.{level}.experts.{expert}" for expert in range(experts)]
            down = torch.stack([take(f"{key}.fc_down.weight", rank, dim) for key in keys])
            up = torch.stack([take(f"{key}.fc_up.weight", dim, rank).T for key in keys])
            levels.append((router, down, up))
        if remaining:
            raise ValueError(f"state_dict has keys that no ladder has: {', '.join(sorted(remaining))}")

        side = cls(dim, rank, len(levels), [router.shape[0] - 1 for router, _, _ in levels])
        for bank, (router, down, up) in zip(side.levels(), levels, strict=True):
            bank.assign(router, down, up, num_frozen)
        return side


def climb(ladders: Mapping[str, SideMoE], hidden: Mapping[str, Hidden], row_weight: Tensor | None) -> dict[str, Tensor]:
    """Runs several side networks over the same N items, all banks of one depth in one launch.

    Args:
        ladders: a side network for every modality.
        hidden: its hidden states, as `SideMoE.forward` takes them.
        row_weight: (N,) or None.

    Returns:
        The last x, (N, D), of every modality.
    """
    states = {name: _levels(name, hidden[name], ladder) for name, ladder in ladders.items()}
    rows = _rows(hidden, states)
    outputs = {name: levels[0] for name, levels in states.items()}
    for depth in range(max(ladder.num_levels for ladder in ladders.values())):
        climbing = [name for name, ladder in ladders.items() if depth < ladder.num_levels]
        banks = [ladders[name].levels()[depth] for name in climbing]
        backbones = [states[name][depth + 1].expand(rows, -1) for name in climbing]
        steps = list(zip(banks, [outputs[name] for name in climbing], backbones, strict=True))
        if any(bank.top_k is not None for bank in banks):
            results = [bank(x, backbone, row_weight) for bank, x, backbone in steps]
        else:
            mixed = side_moe_group([bank.operands(x, backbone, row_weight) for bank, x, backbone in steps])
            results = [bank.own_columns(result) for bank, result in zip(banks, mixed, strict=True)]
        outputs.update(zip(climbing, results, strict=True))
    return outputs


def _rows(hidden: Mapping[str, Hidden], states: Mapping[str, list[Tensor]]) -> int:
    """The number of items, where a level of a sequence may be one row that all of them share."""
    rows = 1
    # One comparison after the other: a compiler's symbolic sizes have no hash, and a set of them is one per size.
    for levels in states.values():
        for level in levels:
            size = level.shape[0]
            if size != 1 and size != rows:
                if rows != 1:
                    raise ValueError(
                        "hidden must hold the same number of items at every level and modality, "
                        f"not {sorted((rows, size))}"
                    )
                rows = size
    for name, value in hidden.items():
        if isinstance(value, Tensor) and value.shape[0] != rows:
            raise ValueError(
                f"{name} holds 1 item, but another modality holds {rows}; give both the same items. Only a level that "
                "all items share may be a single row, (1, D) in a sequence of levels"
            )
    return rows


def _levels(name: str, hidden: Hidden, ladder: SideMoE) -> list[Tensor]:
    count, width = ladder.num_levels + 1, ladder.dim
    wanted = f"{name} must be a Tensor (N, {count}, {width}) or a sequence of {count} levels, each (N or 1, {width})"
    if isinstance(hidden, Tensor):
        if hidden.dim() != 3:
            raise ValueError(f"{wanted}, not a Tensor of shape {tuple(hidden.shape)}")
        levels = list(hidden.unbind(1))
    elif isinstance(hidden, Sequence):
        levels = list(hidden)
    else:
        raise TypeError(f"{wanted}, not a {type(hidden).__name__}")
    if len(levels) != count:
        raise ValueError(f"{wanted}, but it has {len(levels)} levels")
    for place, level in enumerate(levels):
        if not isinstance(level, Tensor):
            raise TypeError(f"{wanted}, but level {place} is a {type(level).__name__}")
        if level.dim() != 2 or level.shape[1] != width:
            raise ValueError(f"{wanted}, but level {place} has shape {tuple(level.shape)}")
    return levels
