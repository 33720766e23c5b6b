"""bench/gpu/suite.sh with a fake Python and GPU: what it runs, skips, resumes and prints."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "bench/gpu/suite.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash")

PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    "-m bench.gpu.name") [ -z "${NO_GPU:-}" ] && echo toy || exit 2 ;;
    "-m bench.gpu.summary --no-cuda-kernels") echo "${NO_CUDA_KERNELS:-}"; [ -n "${NO_CUDA_KERNELS:-}" ] ;;
    "-m bench.gpu.summary "*) echo "the summary" ;;
    *"${FAIL:-nothing fails}"*) echo "this went wrong"; exit 3 ;;
    *"${SLOW:-nothing is slow}"*) echo $$ >"$CALLS.pid"; exec sleep 30 ;;
esac
"""
WORDS = ("and", "or", "not")
SANITIZER = """#!/usr/bin/env bash
echo "compute-sanitizer $*" >>"$CALLS"
[ -z "${NO_SANITIZER:-}" ] || { echo "========= COMPUTE-SANITIZER"; echo "Error: $NO_SANITIZER"; exit 1; }
"""


class Suite:
    """Run the script, and record its calls."""

    def __init__(self, folder: Path) -> None:
        self.results, self.calls, self.programs = folder / "results", folder / "calls", folder / "bin"
        self.programs.mkdir()
        self.add("python3", PYTHON)
        self.add("c++", "#!/usr/bin/env bash\n")

    def add(self, name: str, text: str) -> None:
        program = self.programs / name
        program.write_text(text)
        program.chmod(0o755)

    def environment(self) -> dict[str, str]:
        mine = {"PATH": f"{self.programs}:/usr/bin:/bin", "CALLS": str(self.calls), "GPU_SUITE_COMMIT": "abc"}
        return {name: value for name, value in os.environ.items() if name not in ("PYTHON", "CXX")} | mine

    def run(self, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        mine = self.environment() | environment
        return subprocess.run([SUITE, *arguments], env=mine, cwd=cwd, capture_output=True, text=True, timeout=60)

    def called(self) -> list[str]:
        return [
            call for call in self.calls.read_text().splitlines() if "gpu.summary" not in call and "gpu.name" not in call
        ]

    def markers(self) -> set[str]:
        return {path.stem for path in self.state.glob("*.passed") if path.read_text().startswith("abc ")}

    @property
    def state(self) -> Path:
        return self.results / ".gpu_suite"


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def test_all_runs_every_part_and_leaves_a_marker(suite: Suite) -> None:
    suite.add("compute-sanitizer", SANITIZER)
    ended = suite.run("all", str(suite.results))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    called = suite.called()
    assert called[0] == "setup.py build_ext --inplace"
    assert sum("-m pytest" in call for call in called) == 7
    timed = [call for call in called if "-m bench kernels" in call]
    assert len(timed) == 12
    assert all("--device cuda" in call for call in timed)
    # These decide which backend "auto" selects. route_topk has these rows in an ordinary run.
    for operator, dtype in (("side_moe", "bfloat16"), ("side_moe", "float32"), ("rank_of_target", "float32")):
        decisive = [
            call
            for call in timed
            if f"kernels {operator} " in call and "ours-triton,ours-triton-graph,ours-cuda" in call
        ]
        assert any(f"{dtype}.json" in call for call in decisive)
    assert any("--variants ours,ours-uncounted" in call for call in called)
    memcheck, *others = checks = [
        [call for call in called if call.startswith(f"compute-sanitizer --tool {tool} ") and "-c" not in call.split()]
        for tool in ("memcheck", "racecheck", "synccheck")
    ]
    assert list(map(len, checks)) == [12, 12, 12]
    assert all("--report-api-errors no" in call for call in memcheck)
    assert not any("--report-api-errors" in call for calls in others for call in calls)
    assert all("N=300 E=3 D=768 R=64 M=2" in calls[0] for calls in checks)
    assert all("-m bench.gpu.sanitize " in call for calls in checks for call in calls)
    assert sum("compute-sanitizer" in call for call in called) == 3 * 12 + 1
    assert sum("bench.cli.profile" in call for call in called) == 2
    streamed = [call for call in called if "-m bench stream --dtype bfloat16 --device cuda --top-k 2" in call]
    assert ["--graph" in call for call in streamed] == [False, True]
    assert any("-m bench step --dtype bfloat16 --device cuda" in call for call in called)
    memory = [call for call in called if "-m bench memory" in call]
    assert [call.split()[3] for call in memory] == ["side_moe", "step"]
    assert all("--dtype bfloat16 --device cuda --json" in call for call in memory)
    assert all(option in call for call in memory for option in ("--snapshot", "--plot"))
    files = {word.rpartition("/")[2] for call in called for word in call.split() if str(suite.results) in word}
    assert {
        "side_moe-toy-bfloat16.json",
        "routing-toy-bfloat16.json",
        "ranking-toy-float32.json",
        "loss-toy-bfloat16.json",
        "memory-side_moe-toy-bfloat16.json",
        "memory-step-toy-snapshot.pickle",
        "memory-toy",
    } <= files
    assert {"build", "test_side_moe", "bench_bfloat16", "profile", "racecheck_grouped_mm"} <= suite.markers()
    assert (suite.results / "gpu-suite-toy.md").read_text() == "the summary\n"
    assert ended.stdout.endswith("the summary\n")


def test_a_passed_part_is_not_run_again(suite: Suite) -> None:
    suite.run("build", str(suite.results))
    again = suite.run("build", str(suite.results))
    assert "build: passed before" in again.stdout
    assert suite.called() == []
    suite.run("build", str(suite.results), GPU_SUITE_COMMIT="def")
    assert suite.called() == ["setup.py build_ext --inplace"]
    suite.run("--fresh", "build", str(suite.results))
    assert suite.called() == ["setup.py build_ext --inplace"]


def test_a_part_that_fails_is_shown_and_run_again(suite: Suite) -> None:
    ended = suite.run("test", str(suite.results), FAIL="route_topk/test_gpu.py")
    assert ended.returncode == 1
    assert "this went wrong" in ended.stdout
    assert "test_routing: FAILED (3)" in ended.stdout
    assert "test_rest: passed" in ended.stdout
    assert (suite.state / "test_routing.failed").read_text() == "abc 3\n"
    assert suite.markers() == {"test_side_moe", "test_ranking", "test_loss", "test_cuda", "test_step", "test_rest"}
    ended = suite.run("test", str(suite.results))
    assert ended.returncode == 0
    assert len(suite.called()) == 1
    assert "route_topk" in suite.called()[0]
    assert not (suite.state / "test_routing.failed").exists()


def test_a_part_that_exceeds_its_time_is_stopped(suite: Suite) -> None:
    ended = suite.run("build", str(suite.results), SLOW="build_ext", GPU_SUITE_PART_SECONDS="1")
    assert ended.returncode == 1
    assert "build: FAILED (stopped after 1 s)" in ended.stdout


def test_a_part_that_fails_after_it_passed_for_another_commit_has_one_marker(suite: Suite) -> None:
    suite.run("build", str(suite.results), GPU_SUITE_COMMIT="def")
    assert suite.run("build", str(suite.results), FAIL="build_ext").returncode == 1
    assert [path.name for path in suite.state.glob("build.*") if path.suffix != ".log"] == ["build.failed"]


def test_failures_of_another_commit_do_not_count(suite: Suite) -> None:
    assert suite.run("build", str(suite.results), FAIL="build_ext", GPU_SUITE_COMMIT="def").returncode == 1
    assert suite.run("test", str(suite.results)).returncode == 0
    assert suite.run("test", str(suite.results), GPU_SUITE_COMMIT="def").returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_part_that_runs(suite: Suite, number: signal.Signals) -> None:
    pid = suite.calls.with_name("calls.pid")
    running = subprocess.Popen(
        [SUITE, "build", str(suite.results)],
        env=suite.environment() | {"SLOW": "build_ext"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell cannot trap what is ignored, as it is in the background of `make`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: pid.exists() and pid.read_text().strip())
    part = int(pid.read_text())
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in said
    wait_for(lambda: not Path(f"/proc/{part}/cmdline").exists() or not Path(f"/proc/{part}/cmdline").read_bytes())
    assert suite.markers() == set()
    assert (suite.state / "build.failed").read_text() == "abc did not finish\n"


def wait_for(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_roofline_is_drawn_again(suite: Suite) -> None:
    ended = suite.run("bench", str(suite.results))
    assert "roofline: left out: nothing was measured" in ended.stdout
    steps = suite.results / "step-toy-bfloat16.json"
    steps.write_text("{}")
    for _ in range(2):
        suite.run("bench", str(suite.results))
        (call,) = [call for call in suite.called() if "-m bench roofline" in call]
        assert call.endswith(f"roofline {steps} --plot {suite.results / 'roofline-toy.png'}")
    assert not any("-m bench kernels" in call for call in suite.called())


def test_a_folder_is_the_callers(suite: Suite, tmp_path: Path) -> None:
    suite.run("build", "mine/results", cwd=tmp_path)
    assert (tmp_path / "mine/results/.gpu_suite/build.passed").exists()


def test_an_absent_part_is_reported_and_is_no_failure(suite: Suite) -> None:
    ended = suite.run("sanitize", str(suite.results), PATH=f"{suite.programs}:/usr/bin:/bin")
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert "memcheck: left out: compute-sanitizer is not installed" in ended.stdout
        assert suite.called() == []
    assert ended.returncode == 0
    ended = suite.run("build", str(suite.results), CXX="no-such-compiler")
    assert "build: left out: there is no C++ compiler no-such-compiler" in ended.stdout
    assert ended.returncode == 0
    assert suite.called() == []
    suite.run("build", str(suite.results))
    assert not (suite.state / "build.absent").exists()


def test_a_sanitizer_that_does_not_work_is_reported_and_is_no_failure(suite: Suite) -> None:
    suite.add("compute-sanitizer", SANITIZER)
    ended = suite.run("sanitize", str(suite.results), NO_SANITIZER="Device not supported")
    assert ended.returncode == 0
    assert len(suite.called()) == 1
    said = "compute-sanitizer does not work here: Error: Device not supported"
    assert f"racecheck: left out: {said}" in ended.stdout
    assert (suite.state / "memcheck.absent").read_text() == f"abc {said}\n"
    suite.run("sanitize", str(suite.results))
    assert not list(suite.state.glob("*.absent"))


def test_missing_cuda_kernels_are_reported_and_are_no_failure(suite: Suite) -> None:
    ended = suite.run("build", str(suite.results), NO_CUDA_KERNELS="nvcc was not found")
    assert "cuda_kernels: left out: nvcc was not found" in ended.stdout
    assert ended.returncode == 0
    suite.run("build", str(suite.results))
    assert not list(suite.state.glob("*.absent"))


def test_without_a_gpu_nothing_runs(suite: Suite) -> None:
    ended = suite.run("all", str(suite.results), NO_GPU="1")
    assert ended.returncode == 2
    assert "no GPU" in ended.stderr
    assert suite.called() == []
    assert not suite.results.exists()


@pytest.mark.parametrize("arguments", [["everything"], ["--faster"], ["build", "a", "b"]])
def test_usage_errors_print_the_usage(suite: Suite, arguments: list[str]) -> None:
    ended = suite.run(*arguments)
    assert ended.returncode == 2
    assert "[build|test|bench|sanitize|all] [FOLDER]" in ended.stderr


def selects(expression: str, name: str) -> bool:
    """Return whether an expression of -k selects a name."""
    return bool(eval(re.sub(r"\w+", lambda word: word[0] if word[0] in WORDS else str(word[0] in name), expression)))


def test_every_test_of_kernels_for_gpus_is_in_one_part(suite: Suite) -> None:
    suite.run("test", str(suite.results))
    asked = Counter(word for call in suite.called() for word in call.split() if word.endswith(".py"))
    kernels = ROOT / "tests/kernels"
    expected = {
        str(path.relative_to(ROOT))
        for kind in ("triton", "cuda", "gpu", "xformers")
        for path in kernels.glob(f"*/test_{kind}*.py")
        # Those of backends compile for a GPU that need not be present, or use Triton's interpreter: `make test`.
        if path.parent.name != "backends" or path.name == "test_cuda_emulation.py"
    }
    assert len(expected) > 10
    assert asked == dict.fromkeys(expected, 1)


def test_every_test_of_the_stream_that_needs_a_gpu_is_in_one_part(suite: Suite) -> None:
    suite.run("test", str(suite.results))
    (asked,) = [
        call.partition(" -k ")[2].partition(" --junitxml")[0] for call in suite.called() if " tests/stream " in call
    ]
    for path in (ROOT / "tests/stream").rglob("test_*.py"):
        for name in re.findall(r"@needs_gpu\n(?:@.*\n)*def (\w+)", path.read_text()):
            assert selects(asked, name), name


def test_changed_sources_are_another_commit(suite: Suite) -> None:
    """Without git, the sources are compared."""
    suite.run("build", str(suite.results), GPU_SUITE_COMMIT="", GIT_DIR="/nowhere")
    commit, _, said = (suite.state / "build.passed").read_text().partition(" ")
    assert re.fullmatch(r"unknown-[0-9a-f]{8}", commit)
    assert re.fullmatch(r"\d+ s\n", said)
