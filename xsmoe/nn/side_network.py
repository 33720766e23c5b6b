"""The side network of one modality: a stack of expert banks that reads a frozen encoder's hidden states."""

import warnings
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
    """A stack of expert banks over levels of a frozen encoder: `x_0 = h_0`, `x_l = bank_l(x_{l-1}, h_l)`.

    Source: arXiv 2508.05993.

    Args:
        dim: width D of the hidden states.
        rank: width of an expert's bottleneck.
        num_levels: number of side levels, one less than the number of hidden states (level 0 is the input).
        num_experts: experts at the start: one number for all side levels, or one for each.
        top_k: route each row to its k best experts only; None mixes all (as published).
    """

    def __init__(
        self, dim: int, rank: int, num_levels: int, num_experts: int | Sequence[int] = 1, top_k: int | None = None
    ) -> None:
        super().__init__()
        self.num_levels = num_levels = checks.integer("num_levels", num_levels, 1)
        counts = list(num_experts) if isinstance(num_experts, Iterable) else [num_experts] * num_levels
        if len(counts) != num_levels:
            raise ValueError(f"num_experts must be one number or {num_levels} of them, one per level, not {counts}")
        self.banks = nn.ModuleList(ExpertBank(dim, rank, count, top_k) for count in counts)
        first = self.levels()[0]
        self.dim, self.rank, self.top_k = first.dim, first.rank, first.top_k

    def config(self) -> dict[str, object]:
        return {"dim": self.dim, "rank": self.rank, "num_levels": self.num_levels, "top_k": self.top_k}

    def levels(self) -> list[ExpertBank]:
        """Return the expert banks, from the lowest level to the highest."""
        return [bank for bank in self.banks if isinstance(bank, ExpertBank)]

    @property
    def num_experts(self) -> list[int]:
        """Number of experts of each level."""
        return [bank.num_experts for bank in self.levels()]

    def forward(self, hidden: Hidden, *, row_weight: Tensor | None = None) -> Tensor:
        """Encode N items.

        Args:
            hidden: (N, levels + 1, D), or a sequence of levels, each (N, D) or (1, D) if all items share the row.
            row_weight: (N,), how often each item counts in the utilization; default once.

        Returns:
            (N, D).

        Raises:
            TypeError, ValueError: `hidden` has other levels or widths than this network.
        """
        return run_side_networks({"hidden": self}, {"hidden": hidden}, row_weight)["hidden"]

    def expand(
        self, optimizer: Optimizers = None, *, new_gate: NewGate = "random", generator: torch.Generator | None = None
    ) -> list[Expanded]:
        """Freeze all experts, add one to each level (see `ExpertBank.expand`), and return the new levels."""
        self._require_held(optimizer)
        done = []
        for level, bank in enumerate(self.levels()):
            bank.expand(optimizer, new_gate=new_gate, generator=generator, name=f"banks.{level}")
            done.append(Expanded(level, bank.num_experts, bank.num_frozen))
        return done

    def prune(self, threshold: float = 0.1, optimizer: Optimizers = None, *, rule: PruneRule = "drop") -> list[Pruned]:
        """Drop at most one little-used expert of each level (see `ExpertBank.prune`). Return the dropped experts."""
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
    def from_published(cls, state_dict: Mapping[str, Tensor], *, num_frozen: int = 0) -> "SideMoE":
        """Build the network from the weights of the published module.

        Args:
            state_dict: `moes.i.experts.j.fc_down.weight` (R, D), `moes.i.experts.j.fc_up.weight` (D, R) and
                `routers.i.linear.weight` (E + 1, D), the backbone's row first. Other keys are refused.
            num_frozen: number of experts of each level that become frozen. The published module does not record it.

        Raises:
            ValueError: a key is missing or unknown, or its tensor has another shape.
        """
        remaining = dict(state_dict)

        def pop(key: str, *shape: int) -> Tensor:
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
            router = pop(f"routers.{level}.linear.weight")
            if not levels:
                first = pop("moes.0.experts.0.fc_down.weight")
                (rank, dim), remaining["moes.0.experts.0.fc_down.weight"] = first.shape, first
            experts = router.shape[0] - 1
            if tuple(router.shape) != (experts + 1, dim) or experts < 1 or not 0 <= num_frozen <= experts:
                raise ValueError(
                    f"routers.{level}.linear.weight has shape {tuple(router.shape)}; expected (E + 1, {dim}) with E at "
                    f"least 1 and num_frozen = {num_frozen}"
                )
            keys = [f"moes.{level}.experts.{expert}" for expert in range(experts)]
            down = torch.stack([pop(f"{key}.fc_down.weight", rank, dim) for key in keys])
            up = torch.stack([pop(f"{key}.fc_up.weight", dim, rank).T for key in keys])
            levels.append((router, down, up))
        if remaining:
            raise ValueError(f"state_dict has keys that the published module lacks: {', '.join(sorted(remaining))}")

        side = cls(dim, rank, len(levels), [router.shape[0] - 1 for router, _, _ in levels])
        for bank, (router, down, up) in zip(side.levels(), levels, strict=True):
            bank.assign(router, down, up, num_frozen)
        return side

    @classmethod
    def from_ladder(cls, state_dict: Mapping[str, Tensor], *, num_frozen: int = 0) -> "SideMoE":
        """Call `from_published`. Deprecated."""
        warnings.warn(
            "SideMoE.from_ladder is deprecated; call SideMoE.from_published", DeprecationWarning, stacklevel=2
        )
        return cls.from_published(state_dict, num_frozen=num_frozen)


def run_side_networks(
    networks: Mapping[str, SideMoE], hidden: Mapping[str, Hidden], row_weight: Tensor | None
) -> dict[str, Tensor]:
    """Run several side networks on the same N items. All banks at the same depth run in one launch.

    Args:
        networks: a side network for each modality.
        hidden: the modality's hidden states, in the form of `SideMoE.forward`.
        row_weight: (N,) or None.

    Returns:
        The last x, (N, D), of each modality.
    """
    states = {name: _levels(name, hidden[name], network) for name, network in networks.items()}
    rows = _rows(hidden, states)
    outputs = {name: levels[0] for name, levels in states.items()}
    for depth in range(max(network.num_levels for network in networks.values())):
        active = [name for name, network in networks.items() if depth < network.num_levels]
        banks = [networks[name].levels()[depth] for name in active]
        backbones = [states[name][depth + 1].expand(rows, -1) for name in active]
        steps = list(zip(banks, [outputs[name] for name in active], backbones, strict=True))
        if any(bank.top_k is not None for bank in banks):
            results = [bank(x, backbone, row_weight) for bank, x, backbone in steps]
        else:
            mixed = side_moe_group([bank.operands(x, backbone, row_weight) for bank, x, backbone in steps])
            results = [bank.own_columns(result) for bank, result in zip(banks, mixed, strict=True)]
        outputs.update(zip(active, results, strict=True))
    return outputs


def _rows(hidden: Mapping[str, Hidden], states: Mapping[str, list[Tensor]]) -> int:
    """Return the number of items. A level of a sequence may be a single row that all items share."""
    rows = 1
    # Compare sizes one by one. A set would not work: torch.compile's symbolic sizes have no hash.
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
                f"{name} holds 1 item, but another modality holds {rows}; pass the same items for both. Only a level "
                "that all items share may be a single row, (1, D) in a sequence of levels"
            )
    return rows


def _levels(name: str, hidden: Hidden, network: SideMoE) -> list[Tensor]:
    """Return the levels of a modality's hidden states, after a check of their number and shapes."""
    count, width = network.num_levels + 1, network.dim
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
