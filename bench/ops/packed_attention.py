"""`packed_attention` of B sequences of up to L rows, stored end to end: H heads of width d, without dropout."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.core.baselines import load_library
from bench.core.benchmark import Absent, Benchmark, Implementation, Product, Tensors, Variant, Work
from bench.core.cuda_graphs import our_variants, with_graph
from bench.core.results import Role
from xsmoe_kernels import packed_attention, use_backend
from xsmoe_kernels.runtime import dispatch

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class PackedAttention(Benchmark):
    """The attention of a user encoder. Lengths are random, from L / 2 to L. Baselines pad, and drop the padding."""

    operator: ClassVar[str] = "packed_attention"
    default_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (256,), "L": (10, 50, 200), "H": (2,), "d": (64,)}
    cuda_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (256, 4096)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"L": (10,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (5,), "L": (7, 40), "d": (16,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        users, longest = self.sizes["B"], self.sizes["L"]
        drawn = torch.randint((longest + 1) // 2, longest + 1, (users,), generator=self.generator)
        self.lengths: list[int] = drawn.tolist()
        self.offsets = torch.tensor([0, *self.lengths]).cumsum(0).to(self.device)
        # The places of rows with padding first, as in the published formulation, and with padding last.
        present = torch.arange(longest, 0, -1) <= drawn[:, None]
        self.first, self.last = (t.flatten().nonzero().squeeze(1).to(self.device) for t in (present, present.flip(1)))
        causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        allowed = causal & present[:, None, None, :].to(self.device)
        # Finite, so that a query of padding gives a finite result.
        self.bias = torch.zeros(allowed.shape, device=self.device).masked_fill(~allowed, -1e9)

    @property
    def title(self) -> str:
        return (
            f"{sum(self.lengths)} rows of {len(self.lengths)} sequences of {min(self.lengths)} to {max(self.lengths)}"
        )

    def variants(self) -> list[Variant]:
        scores = 4.0 * self.sizes["B"] * self.sizes["H"] * self.sizes["L"] ** 2

        def compiled() -> Implementation:
            return _implementation(torch.compile(self._published, fullgraph=True, dynamic=False))

        sdpa = Variant("sdpa", Role.EAGER, lambda: _implementation(self._sdpa), baseline=True, peak_estimate=3 * scores)
        found = [
            Variant("published", Role.PAPER, lambda: _implementation(self._published), baseline=True,
                    peak_estimate=5 * scores),
            sdpa,
            Variant("compiled", Role.COMPILED, compiled, compiled=True, flop_like="published",
                    peak_estimate=5 * scores),
            *our_variants(self, self._ours),
        ]  # fmt: skip
        if self.on_cuda:
            found.append(Variant("flash", Role.LIBRARY, lambda: _implementation(self._flash())))
            found.append(with_graph(sdpa, self.device))
        return [
            *found,
            Variant("xformers", Role.LIBRARY, lambda: _implementation(self._xformers())),
            Variant("reference", Role.REFERENCE, self.reference, default=False, peak_estimate=5 * scores),
        ]

    def make_inputs(self) -> Tensors:
        shape = sum(self.lengths), self.sizes["H"], self.sizes["d"]
        leaves = {name: self.normal(*shape).requires_grad_() for name in "qkv"}
        return {**leaves, "grad": self.normal(*shape)}

    def exact(self, inputs: Tensors) -> Tensors:
        wide = {name: inputs[name].detach().double().requires_grad_() for name in "qkv"}
        y = torch.cat([_attend(*each) for each in zip(*(t.split(self.lengths) for t in wide.values()), strict=True)])
        found = torch.autograd.grad(y, list(wide.values()), inputs["grad"].double())
        return {"y": y.detach(), **dict(zip(wide, found, strict=True))}

    def reference(self) -> Implementation:
        return self._ours("reference")

    def work(self) -> Mapping[str, Work]:
        pairs = sum(length * (length + 1) / 2 for length in self.lengths) * self.sizes["H"]
        product = 2.0 * pairs * self.sizes["d"]
        tensor = sum(self.lengths) * self.sizes["H"] * self.sizes["d"] * self.dtype.itemsize
        return {"forward": Work(2 * product, 4 * tensor), "backward": Work(4 * product, 7 * tensor)}

    def products(self) -> Sequence[Product]:
        return (Product(1024, 1024, 1024),)

    def _ours(self, backend: str) -> Implementation:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with use_backend(backend):
                return packed_attention(q, k, v, self.offsets, max_length=self.sizes["L"], lengths=self.lengths)

        native = dispatch.select(self.operator, backend, self.device, self.dtype) == "native"
        least = self.work()["forward"].flop
        # A native kernel's products cannot be counted: two in forward, and five in backward with one recomputation.
        return _implementation(attend, {"forward": least, "backward": 2.5 * least} if native else None)

    def _published(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (self._pad(t, self.first) for t in (q, k, v))
        scores = (queries @ keys.mT).float() / math.sqrt(self.sizes["d"]) + self.bias
        return _unpad(scores.softmax(-1).to(q.dtype) @ values, self.first)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Pad at the end, where a causal query never looks. Without a mask, torch can select a fast kernel."""
        queries, keys, values = (self._pad(t, self.last) for t in (q, k, v))
        return _unpad(F.scaled_dot_product_attention(queries, keys, values, is_causal=True), self.last)

    def _flash(self) -> Attention:
        """Return torch's FlashAttention of packed sequences."""
        if self.dtype == torch.float32:
            raise Absent("FlashAttention supports 16-bit dtypes only")
        try:
            varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except (ImportError, AttributeError) as error:
            raise Absent(f"this torch has no varlen_attn: {error}") from error
        sums, longest = self.offsets.int(), max(self.lengths)
        return lambda q, k, v: varlen(q, k, v, sums, sums, longest, longest, is_causal=True)

    def _xformers(self) -> Attention:
        """Return the xformers function that our operator calls, with its own autograd."""
        fmha: Any = load_library("xformers", "xformers.ops.fmha", self.device)
        mask = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(self.lengths, device=self.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attended: Tensor = fmha.memory_efficient_attention(q[None], k[None], v[None], mask)
            return attended[0]

        return attend

    def _pad(self, rows: Tensor, places: Tensor) -> Tensor:
        """Return (B, H, L, d) from (M, H, d)."""
        users, longest = self.sizes["B"], self.sizes["L"]
        padded = rows.new_zeros(users * longest, *rows.shape[1:]).index_copy(0, places, rows)
        return padded.unflatten(0, (users, longest)).transpose(1, 2)


def _unpad(padded: Tensor, places: Tensor) -> Tensor:
    return padded.transpose(1, 2).flatten(0, 1)[places]


def _implementation(attend: Attention, flop: Mapping[str, float] | None = None) -> Implementation:
    return Implementation(
        lambda inputs: {"y": attend(inputs["q"], inputs["k"], inputs["v"])},
        leaves=lambda inputs: {name: inputs[name] for name in "qkv"},
        flop=flop,
    )


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of one sequence, (n, H, d)."""
    queries, keys, values = (t.transpose(0, 1) for t in (q, k, v))
    future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    scores = (queries @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1)
