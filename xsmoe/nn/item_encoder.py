"""The item encoder: a side network for each modality, and one projection to the item embedding."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from xsmoe.nn.conditioning import Condition, Conditioning, NotFinite, apply
from xsmoe.nn.experts import Expanded, ExpertBank, NewGate, Pruned, PruneRule
from xsmoe.nn.item_ids import ItemIds
from xsmoe.nn.optimizer import Optimizers
from xsmoe.nn.pretrained import Pretrained
from xsmoe.nn.side_network import Hidden, SideMoE, run_side_networks
from xsmoe_kernels.runtime import checks


class XSMoE(Pretrained):
    """Expandable side mixture of experts over the hidden states of frozen encoders, arXiv 2508.05993.

    Args:
        modalities: names of the modalities, in the order in which they are concatenated.
        dim: width of the hidden states: one number for all modalities, or a mapping with one for each.
        num_levels: side levels of each modality.
        rank: width of an expert's bottleneck.
        out_dim: width of the item embedding.
        num_experts: experts at the start: one number for all side levels, or one for each.
        top_k: route each row to its k best experts only; None mixes all (as published).
        condition: how `condition` prepares hidden states, see `Conditioning`: "none", "standardize" or "whiten".
        ids: whether each item has an embedding of its own, which is added to the projected content (`ItemIds`). The
            table is empty at first; `grow_ids` adds rows. Its gradient is sparse, and `torch.optim.Adam` refuses sparse
            gradients. Train with `LazyAdam`, or pass the table `ids.weight` to `torch.optim.SparseAdam`.
    """

    def __init__(
        self,
        modalities: Sequence[str] = ("image", "text"),
        dim: int | Mapping[str, int] = 768,
        num_levels: int = 2,
        rank: int = 64,
        out_dim: int = 128,
        num_experts: int | Sequence[int] = 1,
        top_k: int | None = None,
        condition: Condition = "none",
        ids: bool = False,
    ) -> None:
        super().__init__()
        if condition not in get_args(Condition):
            raise ValueError(f"condition must be one of {', '.join(get_args(Condition))}, not {condition!r}")
        if not isinstance(ids, bool):
            raise ValueError(f"ids must be True or False, not {ids!r}")
        self.condition_kind, self.with_ids = condition, ids
        if isinstance(modalities, str) or not modalities or len(set(modalities)) != len(modalities):
            raise ValueError(f"modalities must be a sequence of distinct names, not {modalities!r}")
        if unfit := [name for name in modalities if not name or "." in name or hasattr(nn.ModuleDict, name)]:
            raise ValueError(f"modalities holds {unfit[0]!r}, which cannot name a module; choose another name")
        widths = dict(dim) if isinstance(dim, Mapping) else dict.fromkeys(modalities, dim)
        if set(widths) != set(modalities):
            raise ValueError(f"dim must name a width for each of {tuple(modalities)}, not {widths}")
        self.modalities = tuple(modalities)
        spelled = "dim[{!r}]" if isinstance(dim, Mapping) else "dim"
        self.dims = {name: checks.integer(spelled.format(name), widths[name], 1) for name in modalities}
        self.num_levels = checks.integer("num_levels", num_levels, 1)
        self.rank = checks.integer("rank", rank, 1)
        self.out_dim = checks.integer("out_dim", out_dim, 1)
        self.top_k = None if top_k is None else checks.integer("top_k", top_k, 1)
        if isinstance(num_experts, Iterable) and not isinstance(num_experts, str):
            num_experts = [checks.integer("num_experts", count, 1) for count in num_experts]
        else:
            num_experts = checks.integer("num_experts", num_experts, 1)
        self.sides = nn.ModuleDict(
            {
                name: SideMoE(width, self.rank, self.num_levels, num_experts, self.top_k)
                for name, width in self.dims.items()
            }
        )
        conditioned = {} if condition == "none" else self.dims
        self.conditioning = nn.ModuleDict(
            {name: Conditioning(condition, width, self.num_levels + 1) for name, width in conditioned.items()}
        )
        self.projection = nn.Linear(sum(self.dims.values()), self.out_dim)
        self.ids = ItemIds(self.out_dim) if ids else None

    def config(self) -> dict[str, Any]:
        return {
            "modalities": list(self.modalities),
            "dim": self.dims,
            "num_levels": self.num_levels,
            "rank": self.rank,
            "out_dim": self.out_dim,
            "top_k": self.top_k,
            "condition": self.condition_kind,
            "ids": self.with_ids,
        }

    def side_networks(self) -> dict[str, SideMoE]:
        """Return the side network of each modality."""
        return {name: side for name, side in self.sides.items() if isinstance(side, SideMoE)}

    def ladders(self) -> dict[str, SideMoE]:
        """Call `side_networks`. Deprecated."""
        warnings.warn("XSMoE.ladders is deprecated; call XSMoE.side_networks", DeprecationWarning, stacklevel=2)
        return self.side_networks()

    def banks(self) -> Iterable[tuple[str, int, ExpertBank]]:
        """Yield all expert banks, as (modality, level, bank)."""
        for modality, side in self.side_networks().items():
            for level, bank in enumerate(side.levels()):
                yield modality, level, bank

    def conditions(self) -> dict[str, Conditioning]:
        """Return the conditioning of each modality; empty if `condition` is "none"."""
        return {name: module for name, module in self.conditioning.items() if isinstance(module, Conditioning)}

    def conditioned(self) -> tuple[str, ...]:
        """Return the modalities whose conditioning is fitted."""
        return tuple(name for name, module in self.conditions().items() if module.fitted)

    def condition(self, modality: str, levels: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """Condition hidden states for `forward`.

        The computation is in float32, and the result is rounded once. Rows pass unchanged if `condition` is "none" or
        the modality is not fitted yet (`xsmoe.stream.hidden_states.conditioned.fit_conditions`). On a GPU this
        synchronizes.

        Args:
            modality: the modality of the hidden states.
            levels: levels + 1 tensors, each (N, D) or (1, D), floating.
            present: (N,) bool, False for an item without the modality; its rows become zeros. None: all items have it.

        Returns:
            The conditioned levels, with the shapes and dtypes of `levels`.

        Raises:
            TypeError, ValueError: the modality, the levels or `present` do not fit; a row is not finite, or exceeds its
                dtype after conditioning.
        """
        if modality not in self.dims:
            raise ValueError(f"modality must be one of {self.modalities}, not {modality!r}")
        rows = [
            checks.floating(f"levels[{place}]", level, "N", self.dims[modality]) for place, level in enumerate(levels)
        ]
        if len(rows) != self.num_levels + 1:
            raise ValueError(f"levels must be {self.num_levels + 1} tensors, not {len(rows)}")
        count = max(map(len, rows))
        if unfit := [len(level) for level in rows if len(level) not in (1, count)]:
            raise ValueError(f"levels must have {count} rows each, or 1 that all items share, not {unfit[0]}")
        if present is not None:
            checks.tensor("present", present, count)
            if present.dtype != torch.bool:
                raise TypeError(f"present must be bool, not {present.dtype}")
        conditioning = self.conditions().get(modality)
        if conditioning is None or not conditioning.fitted:
            return rows
        try:
            return apply(conditioning.transforms(rows[-1].device), rows, present)
        except NotFinite as error:
            raise ValueError(f"{modality}, {error}") from error

    def forward(
        self, hidden: Mapping[str, Hidden], *, row_weight: Tensor | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """Encode N items.

        Args:
            hidden: for each modality (N, levels + 1, D), or a sequence of levels, each (N, D) or (1, D). The rows must
                have passed through `condition`.
            row_weight: (N,), how often each item counts in the utilization; default once.
            ids: (N,) int64, each item's row of the ID table, -1 for none; None encodes content only.

        Returns:
            (N, out_dim).

        Raises:
            TypeError, ValueError: `hidden` lacks a modality, has an extra one, or has other levels or widths; `ids`
                have another shape or dtype, are out of range, or the model has no IDs.
        """
        if not isinstance(hidden, Mapping):
            found = type(hidden).__name__
            raise TypeError(f"hidden must be a mapping with hidden states for each of {self.modalities}, not a {found}")
        if set(hidden) != set(self.modalities):
            raise ValueError(f"hidden must hold exactly the modalities {self.modalities}, not {tuple(hidden)}")
        tops = run_side_networks(self.side_networks(), hidden, row_weight)
        content: Tensor = self.projection(torch.cat([tops[name] for name in self.modalities], dim=1))
        if ids is None:
            return content
        if self.ids is None:
            raise ValueError("ids must be None, since this model has no IDs; build it with ids=True")
        checks.index("ids", ids, content.shape[0])
        # Under autocast the content has fewer bits than the table. Add first, so that the sum is rounded once.
        return (content + self.ids(ids)).to(content.dtype)

    def grow_ids(self, num_items: int, optimizer: Optimizers = None) -> None:
        """Add rows of zeros to the ID table for new items.

        Call it between optimizer steps. It replaces the table, so the table's gradient and hooks are lost.

        Args:
            num_items: the new number of rows, at least the old one.
            optimizer: as in `expand`. The state of old rows is kept; the state of new rows is zero.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: the model has no IDs, `num_items` is below the old number of rows, or no optimizer holds the
                table.
        """
        if self.ids is None:
            raise ValueError("this model has no IDs to grow; build it with ids=True")
        self.ids.grow(num_items, optimizer)

    def expand(
        self, optimizer: Optimizers = None, *, new_gate: NewGate = "random", generator: torch.Generator | None = None
    ) -> dict[str, list[Expanded]]:
        """Freeze all experts and add one to every level of every modality.

        Call it between optimizer steps. It replaces parameters, so their gradients (including accumulated ones) and the
        hooks on them are lost. Copies of this module, such as a moving average of its weights, do not grow with it.
        Create new copies afterwards.

        Args:
            optimizer: the optimizer or optimizers that train this module, or None. Replaced parameters are swapped in
                their groups, and the state of everything else is kept.
            new_gate: the new gate rows. "random": as published. "mean" changes the function less. "copy" splits the
                expert with the largest gate mass in every level and does not change the function.
            generator: the source of the random gate rows.

        Returns:
            For each modality, its levels after the expansion.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: no optimizer holds one of the replaced trainable parameters, or an optimizer keeps one outside
                its groups too, as LBFGS does.
        """
        self._require_held(optimizer)
        return {
            name: side.expand(optimizer, new_gate=new_gate, generator=generator)
            for name, side in self.side_networks().items()
        }

    def prune(
        self, threshold: float = 0.1, optimizer: Optimizers = None, *, rule: PruneRule = "drop"
    ) -> dict[str, list[Pruned]]:
        """Drop the least used expert of every level if its utilization share is below `threshold`.

        With `rule` "merge" the expert is first merged into the nearest one (see `ExpertBank.prune`). The shares have
        been counted since the last `reset_utilization`. `optimizer` is as in `expand`. Call this method between
        optimizer steps.

        Returns:
            For each modality, the dropped experts.

        Raises:
            TypeError, ValueError: as `expand`; ValueError also if counters are not finite. Then nothing is dropped.
        """
        self._require_held(optimizer)
        for modality, level, bank in self.banks():
            bank.require_counted(f"sides.{modality}.banks.{level}")
        return {name: side.prune(threshold, optimizer, rule=rule) for name, side in self.side_networks().items()}

    def _require_held(self, optimizer: Optimizers) -> None:
        for modality, level, bank in self.banks():
            bank.require_held(optimizer, f"sides.{modality}.banks.{level}")

    def reset_utilization(self) -> None:
        """Set all counters to zero."""
        for _, _, bank in self.banks():
            bank.utilization.reset()
