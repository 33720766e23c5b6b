"""The support matrix of README.md: operators, backends, passes, dtypes, and what was measured.

It is rendered from the registration tables of the backends and from the committed results, not from what this machine
can run, so that it is the same everywhere.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from bench.core.machine import ROOT
from bench.core.results import load
from bench.report.tables import markdown_table
from xsmoe_kernels.backends import cpu, cuda, triton, xformers
from xsmoe_kernels.runtime import dispatch

RESULTS = ROOT / "bench" / "results"
BACKWARD = "_backward"
LISTS = {"side_moe_group": "side_moe"}
"""Operators of lists, which a backend without a kernel for them runs entry by entry."""
COMPOSED = {"sparse_side_moe": "route_topk, grouped_mm"}
"""Public functions that are compositions of operators."""
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
REFERENCE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Column(NamedTuple):
    """A backend.

    Attributes:
        title: of its column.
        backend, device: as in result files; xformers is part of the backend "cuda".
        dtypes: those of each operator that it has a kernel for, backward operators by their own name.
        unmeasured: the status of kernels without a committed measurement.
    """

    title: str
    backend: str
    device: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    unmeasured: str


def columns() -> list[Column]:
    """Return the backends with their registration tables."""
    attention = dict.fromkeys(("packed_attention", "packed_attention" + BACKWARD), xformers.DTYPES)
    return [
        Column("CPU (C++)", "native", "cpu", dict.fromkeys(native_operators(), cpu.DTYPES), "tested"),
        Column("Triton", "triton", "cuda", dict.fromkeys(triton.LAUNCHERS, triton.DTYPES), "compiled only"),
        Column("CUDA C++", "cuda", "cuda", {name: one.dtypes for name, one in cuda.OPERATORS.items()}, "compiled only"),
        Column("xformers", "cuda", "cuda", attention, "not run"),
    ]


def native_operators() -> list[str]:
    """Return the operators of the CPU library, by the schemas in its sources."""
    sources = sorted((ROOT / "csrc").glob("*/cpu.cpp"))
    return [name for path in sources for name in re.findall(r'm\.def\(\s*"(\w+)\(', path.read_text())]


def table(subject: str) -> str:
    """Return the matrix; `subject` is "operators"."""
    if subject != "operators":
        raise ValueError(f"the support matrix is of operators, not of {subject!r}")
    head = ["operator", "pass", *(column.title for column in columns()), "PyTorch reference"]
    body = []
    times = measured()
    for name in operator_names():
        backward = name + BACKWARD in dispatch.operators()
        passes = {"forward": _cells(name, "forward", times)}
        if backward:
            passes["backward"] = _cells(name, "backward", times)
        if backward and passes["forward"] == passes["backward"]:
            passes = {"forward, backward": passes["forward"]}
        dtypes = ", ".join(SHORT[dtype] for dtype in REFERENCE_DTYPES)
        body += [[f"`{name}`", title, *cells, dtypes] for title, cells in passes.items()]
    for name, parts in COMPOSED.items():
        body.append([f"`{name}`", "forward, backward", *[f"composed of {parts}"], *[""] * (len(head) - 3)])
    return "\n".join(markdown_table(head, body))


def operator_names() -> list[str]:
    """Return the operators without their backward operators."""
    return sorted(name for name in dispatch.operators() if not name.endswith(BACKWARD))


def measured() -> set[tuple[str, str, str, str, str]]:
    """Return operator, pass, backend, device and dtype of all kernels with times in the committed results."""
    found = set()
    for path in sorted(RESULTS.glob("*.json")):
        if path.name.startswith(("quality-", "demo-", "stream-")):
            continue  # Other records than runs of operators.
        for case in load(path).cases:
            for row in (row for row in case.rows if row.ours and row.passes):
                for one in ("forward", "backward"):
                    if one in row.passes or "both" in row.passes:
                        found |= {
                            (case.operator, one, backend, case.device, row.dtype or case.dtype)
                            for backend in re.split(r"\W+", row.backend or "")
                        }
    return found


def _cells(name: str, one_pass: str, times: set[tuple[str, str, str, str, str]]) -> list[str]:
    found = []
    for column in columns():
        operator = name + BACKWARD if one_pass == "backward" else name
        dtypes: Iterable[torch.dtype] = column.dtypes.get(operator, ())
        by_status: dict[str, list[str]] = {}
        for dtype in dtypes:
            key = name, one_pass, column.backend, column.device, str(dtype).removeprefix("torch.")
            by_status.setdefault("measured" if key in times else column.unmeasured, []).append(SHORT[dtype])
        cell = "; ".join(f"{status} {', '.join(names)}" for status, names in by_status.items())
        single = LISTS.get(name, "")
        if not cell and (single + BACKWARD if one_pass == "backward" else single) in column.dtypes:
            cell = f"by {single}"
        found.append(cell or "-")
    return found
