"""README and docs quote no measurement that no committed result has."""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from bench.core import results
from bench.core.results import Case, Row, Run
from bench.ops.side_moe import LEVELS
from bench.report.comparison import FEW_ROUNDS
from bench.report.tables import ms
from tests.quoted import MEASURED, RESULTS, ROOT, problems, times
from xsmoe_kernels import FrozenExperts

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Measurements that nobody keeps: what decided something once.
HISTORY = {"docs/kernels.md": ("What was tried and left",)}
# Definitions, sizes by design and forecasts; "..." stands for the rest of a paragraph.
CONSTANTS = {
    "docs/benchmarking.md": (
        "| of bound | the speed-of-light bound divided by the median: 100 % is the least possible time |",
        "the copy is one of 96 MiB",
        "a share slightly above 100 % is possible",
        "moved relative to the baselines by more than 5 % (`--least`), and the 99 % interval",
        "Before each step 256 MiB are written",
        "a copy of 1 GiB",
        "(256 MiB and more, if there are enough rows)",
        "off their line by more than 5 % of the largest",
    ),
    "docs/cuda_kernels.md": ("at most 64 MiB of points",),
    "docs/triton_kernels.md": ("What an H200 should do...", "a workspace of at most 64 MiB"),
}


@cache
def run(name: str) -> Run:
    return results.load(RESULTS / f"{name}.json")


def case(name: str, **sizes: int) -> Case:
    (found,) = [one for one in run(name).cases if sizes.items() <= one.sizes.items()]
    return found


def row(of: Case, variant: str) -> Row:
    (found,) = [one for one in of.rows if one.variant == variant]
    return found


def fast(name: str, rival: str, **sizes: int) -> str:
    return times(case(name, **sizes), "ours", rival)


def packs(of: Case, banks: int) -> str:
    """What is held in packs of float32 weights, all experts but one of each bank: twice their size."""
    return mib(2 * banks * (of.sizes["E"] - 1) * 2 * of.sizes["R"] * of.sizes["D"] * 4)


def mib(size: int | None) -> str:
    assert size is not None
    return f"{size / 2**20:.1f}"


def demo() -> Iterator[str]:
    found: dict[str, Any] = json.loads((RESULTS / "demo-cpu.json").read_text())
    quality, cost = found["quality"][0], found["cost"]
    baseline, error = quality["baselines"][quality["best"]]
    assert quality["best"] == "last_window"
    yield (
        f"over five tests of {quality['users']} users in all, HR@10 of {100 * quality['model']:.1f} ± "
        f"{100 * quality['model_se']:.1f} % against {100 * baseline:.1f} ± {100 * error:.1f} % for popularity in the "
        "last window; on all items that are new to their user the model is ahead of the strongest of four baselines "
        f"by {100 * found['difference']:.1f} ± {100 * found['standard_error']:.1f} %; {cost['step_ms']:.1f} ms a "
        f"training step of {found['settings']['batch_size']} users, {cost['seconds']:.0f} s for training and tests, "
        f"{cost['peak_rss_mib']:.0f} MiB at the peak."
    )


def above(name: str, variant: str) -> int:
    """How many of five seeds have the verdict "above"."""
    found = json.loads((RESULTS / f"quality-{name}.json").read_text())["variants"][variant]
    assert len(found["seeds"]) == 5
    return int(found["verdicts"].get("above", 0))


def readme() -> Iterator[str]:
    yield from demo()
    words = ("none", "one", "two", "three", "four", "all five")
    mine, published = (words[above("ml-latest-small", variant)] for variant in ("base", "paper"))
    yield (
        f"On MovieLens' ml-latest-small {mine} of five seeds are above it with these defaults, and {published} under "
        "the published protocol."
    ).replace("all five of five", "all five")
    mean, cls = run("step-cpu-float32").cases
    assert (mean.operator, cls.operator) == ("training_step_mean", "training_step_cls")
    compiled, refused = row(mean, "compiled"), row(cls, "compiled")
    step = compiled.step
    assert step is not None
    assert compiled.peak_bytes is not None
    # An expert's norm is a counter.
    assert refused.status == "refused"
    assert " norm: error" in (refused.reason or "")
    yield (
        f"torch.compile of the published step takes {ms(step.median)} ms and {compiled.peak_bytes / 2**20:.0f} "
        f"MiB with mean pooling in float32, where ours is {times(mean, 'ours', 'compiled')} times as fast; with cls "
        "pooling the gate refuses its counters."
    )
    main, sizes = "side_moe-cpu-float32", "side_moe-cpu-float32-all-sizes"
    ten = case(main, E=10)
    yield (
        "on a CPU ours also holds packs of the frozen experts from step to step, twice their float32 size: "
        f"{packs(ten, LEVELS)} MiB for both levels with ten experts, and {packs(mean, LEVELS * mean.sizes['M'])} MiB "
        "in the float32 steps below."
    )
    yield (
        f"found ours {fast(sizes, 'naive', N=2816, E=1)} times as fast as naive with one expert, and "
        f"{fast(sizes, 'naive', N=2816, E=10)} times with ten."
    )
    # Why they are left to the files.
    assert all(case(name, N=2816, E=32).rounds < FEW_ROUNDS for name in (main, sizes))


def kernels() -> Iterator[str]:
    main, sizes = "side_moe-cpu-float32", "side_moe-cpu-float32-all-sizes"
    one, ten = (row(case(main, E=experts), "ours").step for experts in (1, 10))
    assert one is not None
    assert ten is not None
    yield f"with one expert a step reaches {100 * one.of_bound:.0f} % of the floor, with ten {100 * ten.of_bound:.0f} %"
    found = {experts: [fast(name, "naive", N=2816, E=experts) for name in (main, sizes)] for experts in (1, 10)}
    yield (
        f"two runs found `side_moe` {found[1][0]} and {found[1][1]} times as fast with one expert, and "
        f"{found[10][0]} and {found[10][1]} times with ten"
    )
    shares = profile()
    side = shares["xsmoe_native::side_moe"] + shares["xsmoe_native::side_moe_backward"]
    products, loss_share = shares["aten::mm"] + shares["aten::addmm"], shares["xsmoe_native::in_batch_softmax_loss"]
    yield (
        f"{side:.0f} % of it are `side_moe` and its backward, {products:.0f} % torch's products in the projection and "
        f"the user encoder, {loss_share:.0f} % the loss, "
        f"{shares['aten::index_select']:.0f} % the gathering of hidden states; no other operator takes more than one."
    )
    named = ("side_moe", "side_moe_backward", "in_batch_softmax_loss")
    others = shares.keys() - {f"xsmoe_native::{name}" for name in named}
    assert max(shares[name] for name in others - {"aten::mm", "aten::addmm", "aten::index_select", "all"}) <= 1
    loss = case("loss-cpu-float32", B=256, C=2640)
    ours = row(loss, "ours")
    yield (
        f"a step of two threads takes {mib(ours.peak_bytes)} MiB at its peak, {mib(ours.returned_bytes)} of which it "
        f"returns; the published formulation takes {mib(row(loss, 'published').peak_bytes)} and the eager one "
        f"{mib(row(loss, 'eager').peak_bytes)}."
    )
    large = case("loss-cpu-float32-full-softmax", C=200000)
    ours = row(large, "ours")
    yield (
        f"it takes {mib(ours.peak_bytes)} MiB, {mib(ours.returned_bytes)} of which it returns; eager takes "
        f"{mib(row(large, 'eager').peak_bytes)}."
    )


def profile() -> dict[str, float]:
    """Shares in percent, by kernel."""
    text = (RESULTS / "step-profile-cpu-float32.txt").read_text()
    return {name: float(share) for name, share in re.findall(r"^\| ([A-Za-z_]\S+).*?([\d.]+)% \|$", text, re.MULTILINE)}


CLAIMS = {"README.md": readme, "docs/kernels.md": kernels}


@cache
def claims(page: str) -> tuple[str, ...]:
    return tuple(CLAIMS[page]()) if page in CLAIMS else ()


def found(page: str, text: str) -> list[str]:
    return problems(text, claims=claims(page), constants=CONSTANTS.get(page, ()), history=HISTORY.get(page, ()))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_quotes_what_results_have(page: str) -> None:
    assert found(page, (ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", CLAIMS)
def test_every_changed_digit_is_found(page: str) -> None:
    """Each digit of each sentence, table and list that results stand behind, made another one."""
    text = (ROOT / page).read_text()
    places = sorted({place for begin, end in quoted_spans(page, text) for place in range(begin, end)})
    digits = [place for place in places if text[place].isdigit()]
    assert len(digits) > 50
    for place in digits:
        other = str((int(text[place]) + 1) % 10)
        changed = text[:place] + other + text[place + 1 :]
        assert found(page, changed), f"nobody saw {other} for {text[place]} in {text[place - 40 : place + 20]!r}"


def quoted_spans(page: str, text: str) -> Iterator[tuple[int, int]]:
    for claim in claims(page):
        pattern = r"\s+".join(map(re.escape, claim.split()))
        yield from (match.span() for match in re.finditer(pattern, text))
    for line in re.finditer(r"^\|.*\d\)? \|$|^\|.*\d % \|.*$", text, re.MULTILINE):
        if "What was tried" not in text[: line.start()]:
            yield line.span()


@pytest.mark.parametrize(
    "added",
    [
        "A step is 3.25 times as fast.",
        "It takes 12 ms.",
        "That is 40 % of the floor, and 17.5 MiB.",
        "| variant | note |\n| --- | --- |\n| ours | 12 ms |",
        "| E | variant | ms |\n| --- | --- | --- |\n| 10 | ours | 12.3 |",
    ],
)
def test_a_number_without_a_result_is_found(added: str) -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert found("docs/kernels.md", text.replace("## `side_moe`\n", f"## `side_moe`\n\n{added}\n")) != []


def test_a_table_is_of_the_results_that_its_own_section_links_to() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    table = "| L | ours ms |\n| --- | --- |\n| 10 | 1.41 |"
    before = "Nested tensors have no causal attention on a CPU.\n"
    assert found("docs/kernels.md", text.replace(before, f"{table}\n\n{before}")) == []
    (wrong,) = found("docs/kernels.md", text.replace(before, f"## Elsewhere\n\n{table}\n\n{before}"))
    assert wrong.startswith("0 cases of the linked results are meant by")


def test_what_is_excused_must_be_there() -> None:
    assert problems("No number.", claims=(), constants=("5 % by design",), history=()) != []


@pytest.mark.parametrize(
    "text",
    ["12 ms", "12.5 ms", "1,200 s", "14.1 ± 0.5 %", "3 times", "64 MiB", "27%", "2 us", "2.73 (2.21-3.21) times"],
)
def test_measured_numbers_are_seen(text: str) -> None:
    assert MEASURED.fullmatch(text)


def test_a_ratio_is_quoted_with_its_spread_and_with_rounds_that_are_few() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    whole = times(case("attention-cpu-float32", L=200), "ours", "sdpa")
    ratio, spread, _ = re.fullmatch(r"(\S+)( \(\S+)(; few rounds: 6\))", whole).groups()  # type: ignore[union-attr]
    assert text.count(f" {whole} ") == 1
    for cell in (ratio, f"{ratio}{spread})"):
        (wrong,) = found("docs/kernels.md", text.replace(f" {whole} ", f" {cell} "))
        assert wrong.endswith(f"is {cell}, and the result {whole}")


def test_packs_are_twice_the_weights() -> None:
    of = case("side_moe-cpu-float32", E=10)
    down, up = (torch.randn(of.sizes["E"] - 1, of.sizes["R"], of.sizes["D"]) for _ in range(2))
    pack = FrozenExperts(down, up).pack()
    if pack is None:
        pytest.skip("no native kernels, no packs")
    assert mib(LEVELS * pack.nbytes) == packs(of, LEVELS)


@pytest.mark.parametrize("text", ["2,816 rows", "torch 2.11", "8.6 MB", "sm_90", "12 steps", "N = 2,816"])
def test_sizes_are_no_measurements(text: str) -> None:
    assert not MEASURED.search(text)
