"""Operators are measured where only torch and NumPy are installed."""

import subprocess
import sys

from bench.machine import ROOT

SCRIPT = """
import sys

for name in ("PIL", "pyarrow", "safetensors", "transformers", "matplotlib", "rich", "typer", "hypothesis", "pytest"):
    sys.modules[name] = None

from bench import gpu_sanitize, gpu_summary, losing, profiled
from bench.__main__ import main

sizes = ["--sizes", "N=5", "E=2", "D=8", "R=2"]
assert main(["kernels", "side_moe", *sizes, "--variants", "eager,ours", "--seconds", "0.01"]) == 0
assert main(["memory", "side_moe", *sizes, "--variants", "ours"]) == 0
assert profiled.main(["side_moe", *sizes, "M=1", "--device", "cpu", "--dtype", "float32"]) == 0
assert gpu_sanitize.main(["route_topk", "N=5", "E=3", "k=2", "--device", "cpu"]) == 0
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
