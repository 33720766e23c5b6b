"""The Triton kernels compile for every target within its limits, do not spill, and stay within their budget.

`python -m tests.kernels.helpers.triton_offline --write` writes triton_budget.json, the limits of each kernel. Its
numbers are those of one version of Triton. Another version is checked against the targets' limits only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernels.helpers import triton_offline
from tests.kernels.helpers.triton_offline import BUDGET, TARGETS, Found, too_old

triton = pytest.importorskip("triton")

ORDINARY = "sm_90"
"""The target of ordinary tests. Each compilation needs a minute of a core; test-all compiles for the others."""

FEW_ROWS = {"side_moe.gate_kernel"}
"""Kernels whose blocks have fewer than the 64 rows that a warp group multiplies."""


class Measured(NamedTuple):
    """The result of triton_offline: the version of Triton, all launches, and all compiled kernels."""

    triton: str
    launched: set[tuple[str, str, str]]
    found: list[Found]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return compiled(tmp_path_factory.mktemp("half"), [ORDINARY], "half")


@pytest.fixture(scope="module")
def half_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    others = [target for target in TARGETS if target != ORDINARY]
    return compiled(tmp_path_factory.mktemp("half_elsewhere"), others, "half")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return compiled(tmp_path_factory.mktemp("wide"), list(TARGETS), "tf32", "ieee")


def compiled(folder: Path, targets: list[str], *precisions: str) -> Measured:
    """Return all scenarios, compiled by another process, because this one may interpret its kernels."""
    targets = [target for target in targets if too_old(target, triton.__version__) is None]
    command = [sys.executable, triton_offline.__file__, "--json", str(folder / "found.json")]
    command += ["--targets", *targets, "--precisions", *precisions]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    data = json.loads((folder / "found.json").read_text())
    return Measured(data["triton"], set(map(tuple, data["launched"])), [Found(**one) for one in data["found"]])


def budget() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(BUDGET.read_text())
    return data


def beyond_limits(found: list[Found]) -> list[str]:
    """Return the kernels that do not compile, spill, or need more than their target has."""
    wrong = []
    for one in found:
        limits = TARGETS[one.target].limits
        if one.error or one.spills or one.shared > limits.shared or one.registers > limits.registers:
            wrong.append(triton_offline.line(one))
    return wrong


def beyond_budget(found: list[Found], kernels: dict[str, Any]) -> list[str]:
    """Return the kernels that exceed their entry, have lost their matrix instructions, or have no entry."""
    wrong = []
    for one in found:
        entry = kernels.get(one.kernel, {}).get(one.target, {}).get(one.precision)
        if entry is None:
            wrong.append(f"{triton_offline.line(one)}: no entry")
        elif one.registers > entry["registers"] or one.shared > entry["shared"] or one.matrix != entry["matrix"]:
            wrong.append(f"{triton_offline.line(one)}: budget {entry}")
    return wrong


def stale(kernels: dict[str, Any], launched: set[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return the entries of kernels that nothing launches."""
    entries = {
        (kernel, target, precision)
        for kernel, targets in kernels.items()
        for target, precisions in targets.items()
        for precision in precisions
    }
    return sorted(entries - launched)


def assert_none(wrong: list[Any], hint: str = "") -> None:
    if wrong:
        pytest.fail("\n".join([hint, *map(str, wrong)]), pytrace=False)


@pytest.mark.parametrize("target", [pytest.param(one, marks=[pytest.mark.slow] * (one != ORDINARY)) for one in TARGETS])
def test_half_precision_compiles_within_limits_and_does_not_spill(target: str, request: pytest.FixtureRequest) -> None:
    measured: Measured = request.getfixturevalue("half" if target == ORDINARY else "half_elsewhere")
    assert_none(beyond_limits(found_for(measured, target)))


def found_for(measured: Measured, target: str) -> list[Found]:
    """Return the results for a target; skip the test if this Triton is too old for it."""
    if reason := too_old(target, measured.triton):
        pytest.skip(reason)
    found = [one for one in measured.found if one.target == target]
    assert found
    return found


def test_half_precision_is_within_the_budget(half: Measured) -> None:
    kept_by(half)


@pytest.mark.slow
def test_half_precision_is_within_the_budget_on_other_targets(half_elsewhere: Measured) -> None:
    kept_by(half_elsewhere)


def kept_by(measured: Measured) -> None:
    recorded = budget()
    if recorded["triton"] != measured.triton:
        pytest.skip(f"the budget is that of Triton {recorded['triton']}, and this is {measured.triton}")
    hint = "`python tests/kernels/helpers/triton_offline.py --write` makes what is found the budget"
    assert_none(beyond_budget(measured.found, recorded["kernels"]), hint)


def test_every_kernel_has_an_entry_and_every_entry_a_kernel(half: Measured) -> None:
    kernels = budget()["kernels"]
    assert_none(stale(kernels, half.launched), "these entries are stale:")
    missing = [one for one in half.launched if one[2] not in kernels.get(one[0], {}).get(one[1], {})]
    assert_none(sorted(missing), "these have no entry:")


def test_products_in_half_precision_run_on_warp_groups_on_sm_90(half: Measured) -> None:
    products = [one for one in half.found if one.target == "sm_90" and one.matrix]
    assert len(products) >= 5
    for one in products:
        assert one.matrix == ("mma.sync" if one.kernel in FEW_ROWS else "wgmma.mma_async"), one


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_float32_compiles_within_limits_and_does_not_spill(wide: Measured, target: str) -> None:
    found = found_for(wide, target)
    assert {one.precision for one in found} == {"tf32", "ieee"} & set(TARGETS[target].precisions)
    assert_none(beyond_limits(found))


@pytest.mark.slow
def test_float32_is_within_the_budget(wide: Measured) -> None:
    kept_by(wide)


GOOD = Found("toy.kernel", "sm_90", "half", 128, 1024, 0, "wgmma.mma_async")
ENTRY = {"registers": 128, "shared": 1024, "spills": 0, "matrix": "wgmma.mma_async"}
KERNELS = {"toy.kernel": {"sm_90": {"half": ENTRY}}}


@pytest.mark.parametrize(
    ("change", "limits", "within"),
    [
        ({}, True, True),
        ({"registers": 120, "shared": 512}, True, True),
        ({"registers": 129}, True, False),
        ({"shared": 1025}, True, False),
        ({"matrix": "mma.sync"}, True, False),
        ({"spills": 8}, False, True),
        ({"shared": 233 << 10}, False, False),
        ({"error": "RuntimeError"}, False, True),
        ({"precision": "tf32"}, True, False),
    ],
)
def test_limits_of_a_target(change: dict[str, Any], limits: bool, within: bool) -> None:
    one = triton_offline.replace(GOOD, **change)
    assert (beyond_limits([one]) == []) == limits
    assert (beyond_budget([one], KERNELS) == []) == within


def test_an_old_triton_skips_unsupported_targets() -> None:
    assert [target for target in TARGETS if too_old(target, "3.6.0")] == ["gfx942"]
    assert too_old("gfx942", "3.6.0") == "Triton 3.6.0 is not held to gfx942, which needs 3.7"
    assert not any(too_old(target, version) for target in TARGETS for version in ("3.7.1", "3.10.0+git1", "4.0"))


def test_entries_that_nothing_launches_are_stale() -> None:
    assert stale(KERNELS, {("toy.kernel", "sm_90", "half")}) == []
    assert stale(KERNELS, {("toy.other", "sm_90", "half")}) == [("toy.kernel", "sm_90", "half")]


def test_launches_of_a_kernel_count_by_the_most_that_one_needs() -> None:
    other = triton_offline.replace(GOOD, registers=64, shared=4096, matrix="plain", spills=4)
    (one,) = triton_offline.combined(iter([GOOD, other]))
    assert one == triton_offline.replace(GOOD, shared=4096, matrix="plain", spills=4, launches=2)


def test_the_file_equals_the_result() -> None:
    failed = triton_offline.replace(GOOD, kernel="toy.failed", error="RuntimeError")
    written = triton_offline.dumps(triton_offline.as_budget([GOOD, failed], "3.7.1"))
    assert json.loads(written) == {"triton": "3.7.1", "kernels": KERNELS}
    assert sum("registers" in row and "matrix" in row for row in written.splitlines()) == 1


def test_compiler_output_is_parsed() -> None:
    usage = "Resource usage:\n Function kernel:\n  REG:167 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:664 TEXTURE:0\n"
    assert triton_offline.nvidia_needs(usage) == (167, 16)
    metadata = "  .sgpr_count: 30\n  .sgpr_spill_count: 2\n  .vgpr_count:     126\n  .vgpr_spill_count: 3\n"
    assert triton_offline.amd_needs(metadata) == (126, 5)
