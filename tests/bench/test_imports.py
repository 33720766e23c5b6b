"""Operators are measured with torch and NumPy only."""

import subprocess
import sys

from bench.core.machine import ROOT

SCRIPT = """
import sys

for name in ("PIL", "pyarrow", "safetensors", "transformers", "matplotlib", "rich", "typer", "hypothesis", "pytest"):
    sys.modules[name] = None

from bench.__main__ import main
from bench.cli import profile
from bench.gpu import sanitize, summary
from bench.report import slowdowns

sizes = ["--sizes", "N=5", "E=2", "D=8", "R=2"]
assert main(["kernels", "side_moe", *sizes, "--variants", "eager,ours", "--seconds", "0.01"]) == 0
assert main(["memory", "side_moe", *sizes, "--variants", "ours"]) == 0
assert profile.main(["side_moe", *sizes, "M=1", "--device", "cpu", "--dtype", "float32"]) == 0
assert sanitize.main(["route_topk", "N=5", "E=3", "k=2", "--device", "cpu"]) == 0
assert main(["roofline", "bench/results/routing-cpu-float32.json", "bench/results/step-cpu-float32.json"]) == 0
assert main(["stream", "--windows", "1"]) == 2
for command in ("all", "kernels", "step", "memory", "stream", "quality", "roofline", "compare"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
"""


def test_operators_need_torch_and_numpy_only() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "python -m bench stream: --windows must be at least 2" in ran.stderr
