"""Steps under a machine's ceilings: the rate of its matrix products, and of its memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bench import floor, pictures, standing
from bench.measure import interleave
from bench.results import Case, Run, aligned, percent
from bench.workload import Product
from xsmoe.report.style import BLUE, GREEN, GREY, ORANGE, RED

# Those of the paper's sizes, thin ones and square ones: side levels, the loss, and what a library does best.
PRODUCTS = (
    Product(2816, 768, 64),
    Product(2816, 768, 640),
    Product(2816, 640, 768),
    Product(2560, 128, 2640),
    Product(1024, 1024, 1024),
    Product(4096, 4096, 4096),
)
QUICK_PRODUCTS = PRODUCTS[:-1]
_COLOURS = {"ours": BLUE, "published": RED, "eager": GREY, "compiled": GREEN, "library": ORANGE}
_MARKERS = "osD^vPX*<>"
_LINES = ("-", "--", ":", "-.")


class Ceilings(NamedTuple):
    """Rates that a machine showed: FLOP and bytes a second."""

    flop: float
    bytes: float

    def at(self, intensity: float) -> float:
        """The most FLOP a second at so many FLOP a byte."""
        return min(self.flop, self.bytes * intensity)

    @property
    def ridge(self) -> float:
        """From how many FLOP a byte on the products are the limit."""
        return self.flop / self.bytes


class Point(NamedTuple):
    """A variant of a case.

    Attributes:
        machine: where it was measured, as `machine_of` says.
        variant: with a mark, if it solves an easier problem.
        intensity: the floor's FLOP for each of the floor's bytes; 0 where it has none.
        by_flop: whether `rate` and `ceiling` are FLOP a second; else bytes, as no matrix rate was measured.
        rate: what the whole step reached of the floor's FLOP or bytes.
        ceiling: the most at this intensity, by the rates that were measured between the case's own rounds.
    """

    case: Case
    machine: str
    variant: str
    kind: str
    intensity: float
    by_flop: bool
    rate: float
    ceiling: float

    @property
    def share(self) -> float:
        return self.rate / self.ceiling


class ProductRate(NamedTuple):
    """What `torch.mm` reaches, with the weight lying the better way."""

    product: Product
    dtype: torch.dtype
    rate: float


class Measured(NamedTuple):
    """A machine's ceilings, measured on the spot."""

    products: list[ProductRate]
    bytes: float

    def best(self) -> Ceilings:
        """The highest."""
        return Ceilings(max(one.rate for one in self.products), self.bytes)


def measure(dtype: torch.dtype, device: torch.device, *, quick: bool, seconds: float) -> Measured:
    """Runs the probes of the floor, interleaved."""
    products = QUICK_PRODUCTS if quick else PRODUCTS
    samples = interleave(floor.probes(products, dtype, device), seconds=seconds, warm_up=2)
    found = floor.product_rates(samples, products, dtype, device)
    return Measured([ProductRate(*one) for one in found], floor.byte_rate(samples, device))


def points(runs: Sequence[Run]) -> list[Point]:
    """One for each variant that was measured, of each case whose rates were."""
    return [point for run in runs for case in run.cases for point in _points(case, machine_of(run, case))]


def machine_of(run: Run, case: Case) -> str:
    """What a case's rates are those of: processor or GPU, threads, and torch.

    Raises:
        KeyError: the run does not say.
    """
    facts = run.machine
    chip = facts["gpu"]["name"] if case.device == "cuda" else facts["cpu"]["model"]
    return f"{chip}, {facts['threads']} threads, torch {facts['versions']['torch']}"


def machines(runs: Sequence[Run]) -> list[str]:
    """All of them, each once."""
    return list(dict.fromkeys(machine_of(run, case) for run in runs for case in run.cases))


def ceilings(runs: Sequence[Run]) -> dict[str, Ceilings]:
    """The highest that any case saw, by device and dtype; of several machines each has its own."""
    several = len(machines(runs)) > 1
    found: dict[str, Ceilings] = {}
    for run in runs:
        for case in run.cases:
            if not (case.byte_rate and case.flop_rate):
                continue
            name = f"{case.device} {case.dtype}" + f", {machine_of(run, case)}" * several
            known = found.get(name, Ceilings(0.0, 0.0))
            found[name] = Ceilings(max(known.flop, case.flop_rate), max(known.bytes, case.byte_rate))
    return found


def table_of_products(found: Measured) -> str:
    """Each product's rate, the bandwidth, and the ridges that they make."""
    body = [
        [
            f"({one.product.rows}, {one.product.inner}) x ({one.product.inner}, {one.product.columns})",
            str(one.dtype).removeprefix("torch."),
            f"{one.rate / 1e9:.0f}",
            f"{found.bytes / 1e9:.1f}",
            f"{Ceilings(one.rate, found.bytes).ridge:.1f}",
        ]
        for one in found.products
    ]
    return "\n".join(aligned(["product", "dtype", "GFLOP/s", "GB/s of a copy", "ridge, FLOP/byte"], body))


def table_of_ceilings(found: Mapping[str, Ceilings]) -> str:
    """The same of results: the highest rates between their rounds."""
    body = [
        [name, f"{roof.flop / 1e9:.0f}", f"{roof.bytes / 1e9:.1f}", f"{roof.ridge:.1f}"] for name, roof in found.items()
    ]
    return "\n".join(aligned(["ceilings", "GFLOP/s", "GB/s of a copy", "ridge, FLOP/byte"], body))


def table_of_points(found: Sequence[Point]) -> str:
    """A row for each variant of each case, with its machine where there are several."""
    body = []
    several = len({point.machine for point in found}) > 1
    for point in found:
        unit = "GFLOP/s" if point.by_flop else "GB/s"
        reached, ceiling = (_figures(rate / 1e9) for rate in (point.rate, point.ceiling))
        body.append(
            [
                standing.label(point.case),
                *([point.machine] if several else []),
                point.variant,
                f"{point.intensity:.1f}",
                f"{reached} {unit}",
                f"{ceiling} {unit}",
                percent(point.share),
            ]
        )
    head = ["case", *(["machine"] if several else []), "variant", "FLOP/byte", "reached", "ceiling there", "share"]
    return "\n".join(aligned(head, body))


def draw(found: Sequence[Point], roofs: Mapping[str, Ceilings], title: str) -> Any:
    """Both axes logarithmic: a colour for each kind of variant, a mark for each operator, a roof for each dtype."""
    figure, (axes,) = pictures.figure(1, width=9.0, height=6.0)
    found = [point for point in found if point.by_flop]
    ridges = [roof.ridge for roof in roofs.values()]
    reach = [*(point.intensity for point in found), *ridges]
    left, right = min(reach) / 3, max(reach) * 3
    for (name, roof), line in zip(roofs.items(), _LINES, strict=False):
        x = [left, roof.ridge, right]
        said = f"{name}: {_si(roof.flop)}FLOP/s, {_si(roof.bytes)}B/s, ridge {roof.ridge:.1f}"
        axes.plot(x, [roof.at(one) for one in x], color="black", linestyle=line, label=said)
    operators = list(dict.fromkeys(point.case.operator for point in found))
    for point in found:
        marker = _MARKERS[operators.index(point.case.operator) % len(_MARKERS)]
        axes.plot(point.intensity, point.rate, marker, color=_COLOURS[point.kind], markersize=7, alpha=0.8, mew=0)
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte, of the least work", ylabel="FLOP/s")
    kinds = [kind for kind in _COLOURS if any(point.kind == kind for point in found)]
    for kind in kinds:
        axes.plot([], [], "s", color=_COLOURS[kind], label=kind)
    for place, operator in enumerate(operators):
        axes.plot([], [], _MARKERS[place % len(_MARKERS)], color="black", label=operator)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def _points(case: Case, machine: str) -> Iterator[Point]:
    flop, moved = sum(case.flop.values()), sum(case.bytes.values())
    # The floor is the time that the ceiling takes for the same work.
    by_flop = bool(flop and case.flop_rate)
    work, intensity = flop if by_flop else moved, flop / moved if moved else 0.0
    for row in case.rows:
        timing = standing.whole(row)
        if timing is not None and timing.floor > 0:
            kind = "ours" if standing.ours(row) else standing.role(row.variant)
            rates = work / timing.median, work / timing.floor
            yield Point(case, machine, standing.marked(row), kind, intensity, by_flop, *rates)


def _figures(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _si(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "
