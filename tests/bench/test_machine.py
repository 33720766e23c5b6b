"""Facts of a machine: a GPU, whose driver settings are only read, and the load."""

import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.core import machine

CUDA = torch.device("cuda")
OUTPUT = "580.65.06, 345, 1980, 2619, 2619, 700.00, 31\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Fake a GPU; return the commands that query its driver."""
    commands: list[list[str]] = []
    answer = SimpleNamespace(name="NVIDIA Toy", major=9, minor=0, total_memory=1 << 30, uuid="ab-12")

    def run(command: list[str], **settings: Any) -> Any:
        if command[0] == "nvidia-smi":
            commands.append(command)
            return SimpleNamespace(stdout=OUTPUT)
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: answer)
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_gpu_is_described(asked: list[list[str]]) -> None:
    facts = machine.describe(CUDA)
    assert facts["gpu"]["driver_version"] == "580.65.06"
    assert facts["gpu"]["clocks.max.sm"] == "1980"
    (command,) = asked
    assert command[1] == "--id=GPU-ab-12"
    assert all(part.startswith(("--id=", "--query-gpu=", "--format=")) for part in command[1:])
    line = machine.line(facts)
    assert line.startswith("NVIDIA Toy, CUDA ")
    assert "driver 580.65.06, at 345 of 1980 MHz, Triton " in line


def test_variablesthat_change_times_are_recorded(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ["TRITON_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE"]
    for name in (*variables, "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("GPU_SUITE_COMMIT", "abc-12")
    facts = machine.describe(CUDA)
    assert {*variables, "CUDA_LAUNCH_BLOCKING"} <= facts["environment"].keys()
    assert facts["commit"] == "abc-12"
    assert facts["gpu"]["fp32_precision"] == torch.backends.cuda.matmul.fp32_precision
    assert "gpu" not in machine.describe(torch.device("cpu"))


@pytest.mark.parametrize("output", ["", "[N/A], [Not Supported], 1980, , 2619, 700.00, 31\n", "one, two\n"])
def test_a_silent_driver_is_no_mistake(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.setitem(globals(), "OUTPUT", output)
    facts = machine.describe(CUDA)
    assert facts["gpu"]["driver_version"] is None
    assert "driver" not in machine.line(facts)


def test_no_driver_tool_is_no_mistake(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **settings: Any) -> Any:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", run)
    assert machine.describe(CUDA)["gpu"]["driver_version"] is None


def test_cached_memory_of_the_allocator_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 70), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert machine.available_memory(CUDA) == 150


def test_the_load_is_that_from_before_anything_was_measured(cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.describe(cpu)["load"]
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    assert machine.describe(cpu)["load"] == before
