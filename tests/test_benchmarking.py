"""The example of docs/benchmarking.md runs."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "benchmarking.md"


def test_own_recommender_is_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # On a GPU it leaves a snapshot.
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    exec(compile(example, str(GUIDE), "exec"), {})
    printed = capsys.readouterr().out
    found = re.findall(r"(\d) experts: (\d+) KiB saved for backward, (\d+) KiB at the peak", printed)
    assert [int(experts) for experts, _, _ in found] == [1, 2, 3, 4]
    saved, peaks = ([int(row[place]) for row in found] for place in (1, 2))
    assert sorted(saved) == saved
    assert all(peak > 0 for peak in peaks)
    # Columns and gates of two levels: 2 * 500 * (16 + 1) numbers an expert, and no 2 * 500 * 96 of them.
    each = 2 * 500 * (16 + 1) * 4 / 2**10
    assert [after - before for before, after in pairwise(saved)] == pytest.approx([each] * 3, abs=2)
