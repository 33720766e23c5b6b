"""The item encoder: a side network for every modality, and one projection to the item embedding."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from xsmoe.nn.conditioning import Condition, Conditioning, NotFinite, apply
from xsmoe.nn.experts import Expanded, ExpertBank, NewGate, Pruned, PruneRule
from xsmoe.nn.item_ids import ItemIds
from xsmoe.nn.optimizer import Optimizers
from xsmoe.nn.pretrained import Pretrained
from xsmoe.nn.side_network import Hidden, SideMoE, climb
from xsmoe_kernels.runtime import checks


class XSMoE(Pretrained):
    """Expandable side mixture of experts over the hidden states of frozen encoders, arXiv 2508.05993.

    Args:
        modalities: names of the modalities, in the order in which they are concatenated.
        dim: width of the hidden states, one for all or one for every modality.
        num_levels: side levels of every modality.
        rank: width of an expert's bottleneck.
        out_dim: width of the item embedding.
        num_experts: experts at the start, one number or one for every side level.
        top_k: route each row to its k best experts only; None mixes all (as published).
        condition: how `condition` prepares hidden states, see `Conditioning`: "none", "standardize" or "whiten".
        ids: whether each item has an embedding of its own, added to the projected content (`ItemIds`). It begins
            without rows: `grow_ids` adds them. Its gradient is sparse, so that `torch.optim.Adam` refuses it: train
            with `LazyAdam`, or give the table, `ids.weight`, to `torch.optim.SparseAdam`.
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

    def ladders(self) -> dict[str, SideMoE]:
        """The side network of every modality."""
        return {name: side for name, side in self.sides.items() if isinstance(side, SideMoE)}

    def banks(self) -> Iterable[tuple[str, int, ExpertBank]]:
        """All expert banks, as (modality, level, bank)."""
        for modality, side in self.ladders().items():
            for level, bank in enumerate(side.levels()):
                yield modality, level, bank

    def conditions(self) -> dict[str, Conditioning]:
        """The conditioning of every modality; empty where `condition` is "none"."""
        return {name: module for name, module in self.conditioning.items() if isinstance(module, Conditioning)}

    def conditioned(self) -> tuple[str, ...]:
        """The modalities whose conditioning is fitted."""
        return tuple(name for name, module in self.conditions().items() if module.fitted)

    def condition(self, modality: str, levels: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """Condition hidden states, as `forward` takes them.

        Computes in float32 and rounds once. Rows pass unchanged where `condition` is "none", and until the modality is
        fitted (`xsmoe.stream.hidden_states.conditioned.fit_conditions`). On a GPU this synchronizes.

        Args:
            modality: whose hidden states they are.
            levels: levels + 1 tensors, each (N, D) or (1, D), floating.
            present: (N,) bool, False where an item lacks the modality; its rows become zeros. None: all items have it.

        Returns:
            The levels in their shapes and dtypes.

        Raises:
            TypeError, ValueError: a modality, levels or `present` that do not fit; a row that is not finite, or that
                exceeds its dtype once it is conditioned.
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
        """Encodes N items.

        Args:
            hidden: for every modality (N, levels + 1, D), or a sequence of levels, each (N, D) or (1, D); rows that
                `condition` has conditioned.
            row_weight: (N,), how often each item counts in the utilization; default once.
            ids: (N,) int64, each item's row of the ID table, -1 for none; None encodes content only.

        Returns:
            (N, out_dim).

        Raises:
            TypeError, ValueError: `hidden` lacks a modality, has one too many, or has other levels or widths; `ids`
                have another shape or dtype, are out of range, or are given to a model without IDs.
        """
        if not isinstance(hidden, Mapping):
            found = type(hidden).__name__
            raise TypeError(f"hidden must be a mapping with hidden states for each of {self.modalities}, not a {found}")
        if set(hidden) != set(self.modalities):
            raise ValueError(f"hidden must hold exactly the modalities {self.modalities}, not {tuple(hidden)}")
        tops = climb(self.ladders(), hidden, row_weight)
        content: Tensor = self.projection(torch.cat([tops[name] for name in self.modalities], dim=1))
        if ids is None:
            return content
        if self.ids is None:
            raise ValueError("ids must be None, since this model has no IDs; build it with ids=True")
        checks.index("ids", ids, content.shape[0])
        # Autocast has content in fewer bits than the table: their sum is rounded once.
        return (content + self.ids(ids)).to(content.dtype)

    def grow_ids(self, num_items: int, optimizer: Optimizers = None) -> None:
        """Add rows of zeros to the ID table for items that have arrived.

        Call it between optimizer steps: the table is replaced, and with it go its gradient and hooks.

        Args:
            num_items: rows from now on, at least as many as before.
            optimizer: as in `expand`; the state of all rows is carried over, that of new rows is zero.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: a model without IDs, fewer rows than before, or an optimizer that does not hold the table.
        """
        if self.ids is None:
            raise ValueError("this model has no IDs to grow; build it with ids=True")
        self.ids.grow(num_items, optimizer)

    def expand(
        self, optimizer: Optimizers = None, *, new_gate: NewGate = "random", generator: torch.Generator | None = None
    ) -> dict[str, list[Expanded]]:
        """Freezes all experts and adds one to every level of every modality.

        Call it between optimizer steps: parameters are replaced, and with them go their gradients, also those that are
        still being accumulated, and hooks that were registered on them. Copies of this module, such as a moving average
        of its weights, do not grow with it: make them anew.

        Args:
            optimizer: an optimizer, or several, that train this module: replaced parameters are swapped in their
                groups, and the state of all that remains is carried over.
            new_gate: "random" as published; "mean", which disturbs the function less; or "copy", a split of the expert
                of most gate mass in every level, which leaves the function unchanged.
            generator: the source of the random gate rows.

        Returns:
            For every modality its levels as they are now.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: an optimizer was given that does not hold a trainable parameter that is replaced, or that keeps
                it outside its groups too, as LBFGS does.
        """
        self._require_held(optimizer)
        return {
            name: side.expand(optimizer, new_gate=new_gate, generator=generator)
            for name, side in self.ladders().items()
        }

    def prune(
        self, threshold: float = 0.1, optimizer: Optimizers = None, *, rule: PruneRule = "drop"
    ) -> dict[str, list[Pruned]]:
        """Drops, in every level, the least used expert if its utilization share is below `threshold`.

        With `rule` "merge" the expert nearest to it takes it in first (see `ExpertBank.prune`).

        The shares are those counted since the last `reset_utilization`; `optimizer` and when to call it as in `expand`.
        Returns what was dropped, by modality.

        Raises:
            TypeError, ValueError: as `expand`; ValueError also where counters are not finite. Nothing is dropped then.
        """
        self._require_held(optimizer)
        for modality, level, bank in self.banks():
            bank.require_counted(f"sides.{modality}.banks.{level}")
        return {name: side.prune(threshold, optimizer, rule=rule) for name, side in self.ladders().items()}

    def _require_held(self, optimizer: Optimizers) -> None:
        for modality, level, bank in self.banks():
            bank.require_held(optimizer, f"sides.{modality}.banks.{level}")

    def reset_utilization(self) -> None:
        """Sets all counters to zero."""
        for _, _, bank in self.banks():
            bank.utilization.reset()
