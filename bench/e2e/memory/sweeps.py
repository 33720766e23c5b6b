"""The sizes of memory sweeps: one size changes at a time, and the others stay at a centre."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.core.benchmark import Benchmark, load_benchmark
from bench.e2e.step import STEPS
from bench.ops import OPERATORS


@dataclass(frozen=True)
class Swept:
    """A benchmark whose memory is measured.

    Attributes:
        registry, name: the benchmark.
        centre: the value of each size letter.
        values: the values of the swept letters.
        quick_values: `values` with `--quick`.
        quick_centre, cuda_centre: what differs from `centre` with `--quick` and on a GPU.
    """

    registry: Mapping[str, str]
    name: str
    centre: Mapping[str, int]
    values: Mapping[str, Sequence[int]]
    quick_values: Mapping[str, Sequence[int]]
    quick_centre: Mapping[str, int] = field(default_factory=dict)
    cuda_centre: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> type[Benchmark]:
        return load_benchmark(self.registry, self.name)


def _step(pooling: str) -> Swept:
    return Swept(
        STEPS,
        pooling,
        centre={"B": 256, "I": 5000, "E": 8, "M": 2, "D": 768, "R": 64},
        values={"E": (1, 2, 4, 8, 12), "B": (32, 64, 128, 256), "M": (1, 2, 3)},
        quick_centre={"B": 64, "I": 1000, "E": 4},
        quick_values={"E": (1, 2, 4), "B": (16, 32, 64), "M": (1, 2)},
    )


SWEPT: dict[str, Swept] = {
    "side_moe": Swept(
        OPERATORS,
        "side_moe",
        centre={"N": 2816, "E": 10, "D": 768, "R": 64, "M": 1},
        values={"E": (1, 2, 4, 10, 20, 32), "N": (256, 1024, 2816, 8192), "R": (16, 32, 64, 128)},
        quick_values={"E": (1, 4, 10), "N": (352, 704, 1408), "R": (16, 32, 64)},
        quick_centre={"N": 1408},
        cuda_centre={"M": 2},
    ),
    "step": _step("mean"),
    "step_cls": _step("cls"),
}


@dataclass(frozen=True)
class Plan:
    """The sweeps of a benchmark: a centre, and the values of each letter that changes."""

    centre: dict[str, int]
    values: dict[str, tuple[int, ...]]

    def sweeps(self) -> Iterator[tuple[str, list[dict[str, int]]]]:
        """Yield each swept letter with the sizes of its points. Without a swept letter, yield the centre alone."""
        if not self.values:
            yield next(iter(self.centre)), [self.centre]
        for letter, values in self.values.items():
            yield letter, [{**self.centre, letter: value} for value in values]


def plan(swept: Swept, asked: Mapping[str, Sequence[int]], *, quick: bool, cuda: bool) -> Plan:
    """Return the sweeps of a benchmark.

    Args:
        swept: the benchmark.
        asked: sizes of the command line. One value moves the centre and removes the letter's sweep. Several values are
            swept; the centre is the usual value if it is among them, and the middle value otherwise. Letters that the
            benchmark does not have are ignored.
        quick: whether `--quick` was given.
        cuda: whether the device is a GPU.
    """
    centre = {**swept.centre, **(swept.cuda_centre if cuda else {}), **(swept.quick_centre if quick else {})}
    values = {letter: tuple(one) for letter, one in (swept.quick_values if quick else swept.values).items()}
    for letter, given in asked.items():
        if letter not in centre:
            continue
        chosen = tuple(sorted(set(given)))
        if centre[letter] not in chosen:
            centre[letter] = chosen[len(chosen) // 2]
        if len(chosen) > 1:
            values[letter] = chosen
        else:
            values.pop(letter, None)
    return Plan(centre, values)
