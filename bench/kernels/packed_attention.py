"""`packed_attention` of B sequences of up to L rows, which lie end to end: H heads of width d, without dropout."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.graph import on_cuda, replayed_like
from bench.kernels import rivals
from bench.workload import Absent, Product, Tensors, Variant, Work, Workload
from xsmoe_kernels import packed_attention, use_backend
from xsmoe_kernels.runtime import dispatch

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class PackedAttention(Workload):
    """The attention of a user encoder. Lengths are drawn from half of L to L; rivals pad, and drop what they padded."""

    operator: ClassVar[str] = "packed_attention"
    letters: ClassVar[Mapping[str, Sequence[int]]] = {"B": (256,), "L": (10, 50, 200), "H": (2,), "d": (64,)}
    cuda_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (256, 4096)}
    quick_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"L": (10,)}
    tiny_sizes: ClassVar[Mapping[str, Sequence[int]]] = {"B": (5,), "L": (7, 40), "d": (16,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        users, longest = self.sizes["B"], self.sizes["L"]
        drawn = torch.randint((longest + 1) // 2, longest + 1, (users,), generator=self.generator)
        self.lengths: list[int] = drawn.tolist()
        self.offsets = torch.tensor([0, *self.lengths]).cumsum(0).to(self.device)
        # Which places hold rows where padding comes first, as in the published formulation, and where it comes last.
        present = torch.arange(longest, 0, -1) <= drawn[:, None]
        self.first, self.last = (t.flatten().nonzero().squeeze(1).to(self.device) for t in (present, present.flip(1)))
        causal = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        allowed = causal & present[:, None, None, :].to(self.device)
        # Finite, so that a query of padding comes out finite too.
        self.bias = torch.zeros(allowed.shape, device=self.device).masked_fill(~allowed, -1e9)

    @property
    def title(self) -> str:
        return (
            f"{sum(self.lengths)} rows of {len(self.lengths)} sequences of {min(self.lengths)} to {max(self.lengths)}"
        )

    def variants(self) -> tuple[str, ...]:
        names = "published", "sdpa", "compiled", "ours"
        return *names, *on_cuda(self.device, "flash", "sdpa-graph", "ours-graph"), "xformers"

    def optional(self) -> tuple[str, ...]:
        return ("reference",)

    def baselines(self) -> tuple[str, ...]:
        return "published", "sdpa"

    def draw(self) -> Tensors:
        shape = sum(self.lengths), self.sizes["H"], self.sizes["d"]
        leaves = {name: self.normal(*shape).requires_grad_() for name in "qkv"}
        return {**leaves, "grad": self.normal(*shape)}

    def exact(self, rows: Tensors) -> Tensors:
        wide = {name: rows[name].detach().double().requires_grad_() for name in "qkv"}
        y = torch.cat([_attend(*each) for each in zip(*(t.split(self.lengths) for t in wide.values()), strict=True)])
        found = torch.autograd.grad(y, list(wide.values()), rows["grad"].double())
        return {"y": y.detach(), **dict(zip(wide, found, strict=True))}

    def reference(self) -> Variant:
        return self._ours("reference", "reference")

    def build(self, name: str) -> Variant:
        if name.endswith("-graph"):
            return replayed_like(self.build, name, self.device)
        if name == "reference":
            return self.reference()
        if name == "ours":
            return self._ours(name, "auto")
        if name == "published":
            return _variant(name, self._published)
        if name == "compiled":
            run = torch.compile(self._published, fullgraph=True, dynamic=False)
            return _variant(name, run, like="published", compiled=True)
        if name == "sdpa":
            return _variant(name, self._sdpa)
        if name == "flash":
            return _variant(name, self._flash())
        if name == "xformers":
            return _variant(name, self._xformers())
        raise ValueError(f"packed_attention has no variant {name!r}")

    def work(self) -> Mapping[str, Work]:
        pairs = sum(length * (length + 1) / 2 for length in self.lengths) * self.sizes["H"]
        product = 2.0 * pairs * self.sizes["d"]
        tensor = sum(self.lengths) * self.sizes["H"] * self.sizes["d"] * self.dtype.itemsize
        return {"forward": Work(2 * product, 4 * tensor), "backward": Work(4 * product, 7 * tensor)}

    def products(self) -> Sequence[Product]:
        return (Product(1024, 1024, 1024),)

    def memory(self, name: str) -> float:
        scores = 4.0 * self.sizes["B"] * self.sizes["H"] * self.sizes["L"] ** 2
        return {"published": 5, "compiled": 5, "reference": 5, "sdpa": 3}.get(name, 0) * scores

    def _ours(self, name: str, backend: str) -> Variant:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with use_backend(backend):
                return packed_attention(q, k, v, self.offsets, max_length=self.sizes["L"], lengths=self.lengths)

        native = dispatch.select(self.operator, backend, self.device, self.dtype) == "native"
        least = self.work()["forward"].flop
        # A native kernel's products cannot be counted as they run: two, and five, of which one was there before.
        return _variant(name, attend, products={"forward": least, "backward": 2.5 * least} if native else None)

    def _published(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (self._pad(t, self.first) for t in (q, k, v))
        scores = (queries @ keys.mT).float() / math.sqrt(self.sizes["d"]) + self.bias
        return _unpad(scores.softmax(-1).to(q.dtype) @ values, self.first)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Padding stands last, where a causal query never looks, so that no mask keeps a fast kernel away."""
        queries, keys, values = (self._pad(t, self.last) for t in (q, k, v))
        return _unpad(F.scaled_dot_product_attention(queries, keys, values, is_causal=True), self.last)

    def _flash(self) -> Attention:
        """Torch's FlashAttention of sequences that lie end to end."""
        if self.dtype == torch.float32:
            raise Absent("FlashAttention takes 16-bit numbers only")
        try:
            varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except (ImportError, AttributeError) as error:
            raise Absent(f"this torch has no varlen_attn: {error}") from error
        sums, longest = self.offsets.int(), max(self.lengths)
        return lambda q, k, v: varlen(q, k, v, sums, sums, longest, longest, is_causal=True)

    def _xformers(self) -> Attention:
        """What our operator asks xformers for, by its own autograd."""
        fmha: Any = rivals.load("xformers", "xformers.ops.fmha", self.device)
        mask = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(self.lengths, device=self.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attended: Tensor = fmha.memory_efficient_attention(q[None], k[None], v[None], mask)
            return attended[0]

        return attend

    def _pad(self, rows: Tensor, places: Tensor) -> Tensor:
        """(M, H, d) -> (B, H, L, d)."""
        users, longest = self.sizes["B"], self.sizes["L"]
        padded = rows.new_zeros(users * longest, *rows.shape[1:]).index_copy(0, places, rows)
        return padded.unflatten(0, (users, longest)).transpose(1, 2)


def _unpad(padded: Tensor, places: Tensor) -> Tensor:
    return padded.transpose(1, 2).flatten(0, 1)[places]


def _variant(name: str, attend: Attention, **options: Any) -> Variant:
    return Variant(name, lambda rows: {"y": attend(rows["q"], rows["k"], rows["v"])}, _leaves, **options)


def _leaves(rows: Tensors) -> Tensors:
    return {name: rows[name] for name in "qkv"}


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, (n, H, d)."""
    queries, keys, values = (t.transpose(0, 1) for t in (q, k, v))
    future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    scores = (queries @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1)
