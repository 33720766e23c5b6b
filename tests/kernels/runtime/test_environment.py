"""The result of info(), and the modules that importing the package loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xsmoe_kernels
from xsmoe_kernels import info, use_backend
from xsmoe_kernels.backends import cpu as cpu_backend
from xsmoe_kernels.backends import shared_library
from xsmoe_kernels.backends import triton as triton_backend
from xsmoe_kernels.runtime import dispatch

ROOT = Path(xsmoe_kernels.__file__).parents[1]


def test_reports_versions_and_devices_as_json() -> None:
    report = info()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["xsmoe_kernels"] == xsmoe_kernels.__version__
    assert report["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert len(report["devices"]["cuda"]) == torch.cuda.device_count()
    with use_backend("reference"):
        assert info()["requested"] == "reference"


def test_reports_the_backend_of_each_operator_and_why_not_the_others() -> None:
    operators = info()["operators"]
    assert set(operators) == set(dispatch.operators())
    for service in operators.values():
        cpu = service["cpu"]
        assert cpu["backend"] in dispatch.BACKENDS
        assert {cpu["backend"], *cpu["unavailable"], *cpu["by_name"]} <= set(dispatch.BACKENDS)
        assert not cpu["by_name"].keys() & {cpu["backend"], *cpu["unavailable"]}
        assert cpu["backend"] not in cpu["unavailable"]
        assert all(cpu["unavailable"].values())
    assert operators["topk_items"]["cpu"]["unavailable"]["cuda"]


@pytest.mark.skipif(cpu_backend.library is None, reason=cpu_backend.describe().get("unavailable", ""))
def test_reports_the_build_of_the_native_kernels() -> None:
    report = info()["native"]
    assert "unavailable" not in report
    if report["compiler"] is None:
        pytest.skip("the build left no facts next to the library")
    assert report["tier"] in report["tiers"]
    assert report["tiers"][0] == "baseline"
    assert set(report["tiers"]) <= set(report["compiled"])
    assert not set(report["compiled"]) & set(report["left_out"])
    assert "-std=c++" in report["flags"]
    assert report["torch"][0].isdigit()


def test_reports_why_there_are_no_native_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_backend, "library", None)
    monkeypatch.setattr(shared_library, "FOLDER", tmp_path / "xsmoe_kernels")
    (tmp_path / "xsmoe_kernels").mkdir()
    assert info()["native"]["unavailable"].startswith("the native kernels are not built: install xsmoe again")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").touch()
    reason = f"the native kernels are not built: run `python setup.py build_ext --inplace` in {tmp_path}"
    assert info()["native"] == {"unavailable": reason}
    (tmp_path / "xsmoe_kernels" / cpu_backend.FAILURE).write_text("no C++ compiler was found\n")
    assert info()["native"] == {"unavailable": "no C++ compiler was found"}


def test_reports_why_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    cuda = info()["operators"]["side_moe"]["cuda"]
    assert cuda["backend"] is None
    assert set(cuda["unavailable"].values()) == {"torch was built without CUDA"}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert set(info()["operators"]["side_moe"]["cuda"]["unavailable"].values()) == {"torch finds no CUDA device"}


@pytest.mark.skipif(triton_backend._missing_reason() is not None, reason=triton_backend._missing_reason() or "")
def test_reports_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    # Without kernels of other libraries, which would ask for the GPU as well.
    kernels = {name: {k: v for k, v in own.items() if k != "cuda"} for name, own in dispatch._kernels.items()}
    monkeypatch.setattr(dispatch, "_kernels", kernels)
    operators = info()["operators"]
    for operator in triton_backend.LAUNCHERS:
        service = operators[operator]["cuda"]
        assert service["backend"] == "reference"
        assert "compute capability 8.0 or newer" in service["unavailable"]["triton"]


def test_importing_loads_no_optional_library_and_warns_of_nothing() -> None:
    script = (
        "import sys, xsmoe_kernels; xsmoe_kernels.info(); "
        "print(sorted({'triton', 'xformers', 'xsmoe', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.stderr == ""
    assert ran.stdout.strip() == "[]"


def test_the_public_names_are_all_there() -> None:
    for name in xsmoe_kernels.__all__:
        assert getattr(xsmoe_kernels, name) is not None
    assert callable(xsmoe_kernels.side_moe), "the function, not the folder of its name"
