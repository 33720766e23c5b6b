"""Which sizes are measured: a centre, and for some letters the values that are taken while the others stay there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from bench import kernels, steps
from bench.workload import Workload


@dataclass(frozen=True)
class Swept:
    """A room whose memory is measured.

    Attributes:
        house, name: the package of rooms, and what the room is called there.
        centre: a size for each letter.
        values: those of the letters that are swept.
        cuda_centre, quick_centre, quick_values: what differs on a GPU and with `--quick`.
    """

    house: ModuleType
    name: str
    centre: Mapping[str, int]
    values: Mapping[str, Sequence[int]]
    quick_values: Mapping[str, Sequence[int]]
    quick_centre: Mapping[str, int] = field(default_factory=dict)
    cuda_centre: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> type[Workload]:
        """The room itself."""
        found: type[Workload] = self.house.room(self.name)
        return found


def _step(pooling: str) -> Swept:
    return Swept(
        steps,
        pooling,
        centre={"B": 256, "I": 5000, "E": 8, "M": 2, "D": 768, "R": 64},
        values={"E": (1, 2, 4, 8, 12), "B": (32, 64, 128, 256), "M": (1, 2, 3)},
        quick_centre={"B": 64, "I": 1000, "E": 4},
        quick_values={"E": (1, 2, 4), "B": (16, 32, 64), "M": (1, 2)},
    )


SWEPT: dict[str, Swept] = {
    "side_moe": Swept(
        kernels,
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
    """The sweeps of a room: a centre, and the values of each letter that changes."""

    centre: dict[str, int]
    values: dict[str, tuple[int, ...]]

    def sweeps(self) -> Iterator[tuple[str, list[dict[str, int]]]]:
        """Each letter that changes, with the sizes of its points; at least one sweep, if of the centre alone."""
        if not self.values:
            yield next(iter(self.centre)), [self.centre]
        for letter, values in self.values.items():
            yield letter, [{**self.centre, letter: value} for value in values]


def plan(swept: Swept, asked: Mapping[str, Sequence[int]], *, quick: bool, cuda: bool) -> Plan:
    """The sweeps of a room.

    Args:
        swept: the room.
        asked: what replaces its sizes. One value moves the centre and ends the letter's sweep, several sweep it; of
            those the centre is the usual one if it is among them, else the middle one. Letters of other rooms are
            passed over.
        quick: whether the sizes are those of `--quick`.
        cuda: whether they are those of a GPU.
    """
    centre = {**swept.centre, **(swept.cuda_centre if cuda else {}), **(swept.quick_centre if quick else {})}
    values = {letter: tuple(one) for letter, one in (swept.quick_values if quick else swept.values).items()}
    for letter, given in asked.items():
        if letter not in centre:
            continue
        taken = tuple(sorted(set(given)))
        if centre[letter] not in taken:
            centre[letter] = taken[len(taken) // 2]
        if len(taken) > 1:
            values[letter] = taken
        else:
            values.pop(letter, None)
    return Plan(centre, values)
