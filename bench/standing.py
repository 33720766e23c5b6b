"""How our rows stand beside their rivals': who a rival is, ratios of rounds, and where we lose."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from bench.compare import FEWEST_ROUNDS
from bench.kernels import grouped_mm_rivals, softmax_loss_rivals
from bench.measure import Quantiles, ratios
from bench.results import Case, Row, Run, Timing, lettered, ms

PUBLISHED = ("published", "naive", "naive-autocast", "naive-narrow")
LIBRARIES = (*softmax_loss_rivals.MODULES, *grouped_mm_rivals.MODULES, "xformers", "flash")
ROLES = ("published", "eager", "compiled", "library")


class Rival(NamedTuple):
    """A rival's row, and how many times faster ours is, over the rounds."""

    row: Row
    ratio: Quantiles


class Loss(NamedTuple):
    """A pass in which ours takes longer than a rival, by the median of the rounds' ratios."""

    case: Case
    row: Row
    rival: Row
    one_pass: str
    ratio: Quantiles


def ours(row: Row) -> bool:
    """Whether our kernels are what the row times."""
    return row.variant.startswith("ours")


def role(variant: str) -> str:
    """What a rival is: the published formulation, plain PyTorch, what torch.compile makes, or a library."""
    if variant in PUBLISHED:
        return "published"
    if variant in LIBRARIES:
        return "library"
    return "compiled" if variant.startswith("compiled") else "eager"


def step(row: Row) -> str:
    """The pass that is a row's whole step."""
    return "both" if "both" in row.passes else "forward"


def whole(row: Row) -> Timing | None:
    """A row's whole step, if it was timed."""
    return row.passes.get(step(row))


def label(case: Case) -> str:
    """A case in a few words."""
    return f"{case.operator} {case.dtype} {lettered(case.sizes)}"


def ratio(row: Row, rival: Row, one_pass: str) -> Quantiles | None:
    """How many times faster a pass of a row is than a rival's, round by round."""
    mine, theirs = row.passes.get(one_pass), rival.passes.get(one_pass)
    if mine is None or theirs is None:
        return None
    return ratios(mine.samples, theirs.samples)


def rivals(case: Case, row: Row) -> Iterator[Row]:
    """The rows of a case that solve the same problem as one of ours, and are not ours."""
    for other in case.rows:
        if not ours(other) and problem(other) == problem(row):
            yield other


def problem(row: Row) -> str | None:
    """The easier problem that a row solves, if it does."""
    said = row.remark or ""
    return said.partition(";")[0] if said.startswith("solves another problem") else None


def marked(row: Row) -> str:
    """A row's name, with a mark if it solves an easier problem than its case; `explained` says which."""
    return row.variant if problem(row) is None else f"{row.variant}*"


def explained(rows: Iterable[Row]) -> list[str]:
    """What the marks stand for: a line for each easier problem, with who solves it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if (said := problem(row)) is not None and row.variant not in found.setdefault(said, []):
            found[said].append(row.variant)
    return [f"* {', '.join(names)} {said}; compared with each other only" for said, names in found.items()]


def few_rounds(samples: Sequence[float]) -> str:
    """What to add where so few rounds were timed that their median and ratios say little."""
    return f"; few rounds: {len(samples)}" if len(samples) < FEWEST_ROUNDS else ""


def best(case: Case, row: Row, of: str) -> Rival | None:
    """The fastest rival of a role that was measured in a case."""
    found = [
        Rival(other, compared)
        for other in rivals(case, row)
        if role(other.variant) == of and (compared := ratio(row, other, step(row)))
    ]
    return min(found, key=lambda rival: rival.ratio.median, default=None)


def losses(runs: Sequence[Run], *, steps: bool) -> list[Loss]:
    """Where ours is slower than a rival in a whole step; or, with `steps` false, in a pass of a step that is not."""
    found = []
    for case in (case for run in runs for case in run.cases):
        for row in filter(ours, case.rows):
            for rival in rivals(case, row):
                slower = [
                    Loss(case, row, rival, one, compared)
                    for one in row.passes
                    if (compared := ratio(row, rival, one)) and compared.median < 1
                ]
                lost = any(loss.one_pass == step(row) for loss in slower)
                found += [loss for loss in slower if (loss.one_pass == step(row) if steps else not lost)]
    return found


def told(loss: Loss) -> str:
    """A loss in a line."""
    timing = loss.row.passes[loss.one_pass]
    mine, theirs = timing.median, loss.rival.passes[loss.one_pass].median
    one_pass = "" if loss.one_pass == step(loss.row) else f", {loss.one_pass}"
    return (
        f"{label(loss.case)}{one_pass}: {marked(loss.row)} {loss.ratio.median:.2f} times as fast as "
        f"{marked(loss.rival)} ({loss.ratio.p10:.2f}-{loss.ratio.p90:.2f}), {ms(mine)} and {ms(theirs)} ms"
        f"{few_rounds(timing.samples)}"
    )
