"""Command `xsmoe info`: versions, devices and backends."""

import json
from typing import Any

from xsmoe.cli.display import Display
from xsmoe_kernels import info as kernel_info


def info(display: Display, *, as_json: bool) -> None:
    """Show versions, devices, and the backend of each operator, with the reasons why others are unavailable."""
    found = kernel_info()
    if as_json:
        display.say(json.dumps(found, indent=2))
        return
    display.heading("Versions")
    rows = [[name, "absent" if version is None else str(version)] for name, version in found["versions"].items()]
    display.lines(_indented(rows))
    display.heading("Devices")
    cpu = found["devices"]["cpu"]
    lines = [["cpu", ", ".join(f"{name} {value}" for name, value in cpu.items())]]
    for number, gpu in enumerate(found["devices"]["cuda"]):
        capability = ".".join(map(str, gpu["capability"]))
        lines.append([f"cuda:{number}", f"{gpu['name']}, capability {capability}, {gpu['memory'] / 2**30:.0f} GiB"])
    if not found["devices"]["cuda"]:
        lines.append(["cuda", "none"])
    display.lines(_indented(lines))
    _show_cpu(found["native"], display)
    _show_cuda(found["cuda_kernels"], display)
    for device in ("cpu", "cuda"):
        _show_operators(device, {name: on[device] for name, on in found["operators"].items()}, display)


def _show_cpu(native: dict[str, Any], display: Display) -> None:
    """Show build and instruction set of the C++ kernels for the CPU, or why they are unavailable."""
    if "unavailable" in native:
        display.heading(f"CPU kernels: none, {native['unavailable']}")
        return
    display.heading("CPU kernels")
    rows = [["instructions", native["tier"] + (f", of {', '.join(native['tiers'])}" if native["tiers"] else "")]]
    rows += [[name, native[name]] for name in ("compiler", "torch") if native[name]]
    if native["left_out"]:
        rows.append(["left out", ", ".join(native["left_out"])])
    rows.append(["library", native["library"]])
    display.lines(_indented(rows))


def _show_cuda(cuda: dict[str, Any], display: Display) -> None:
    """Show build and architectures of the CUDA kernels, or why they are unavailable."""
    if "unavailable" in cuda:
        display.heading(f"CUDA kernels: none, {cuda['unavailable']}")
        return
    display.heading("CUDA kernels")
    rows = [["architectures", "emulated on the CPU" if cuda["emulated"] else ", ".join(cuda["architectures"])]]
    rows += [[name, cuda[name]] for name in ("compiler", "torch", "library")]
    display.lines(_indented(rows))


def _show_operators(device: str, operators: dict[str, Any], display: Display) -> None:
    """Show the backend of each operator on a type of device. Equal reasons of several operators are shown once."""
    reasons: dict[str, list[tuple[str, str]]] = {}
    for operator, service in operators.items():
        for backend, reason in (*service["unavailable"].items(), *service["by_name"].items()):
            general = reason.replace(operator, "this operator")
            reasons.setdefault(general, []).append((operator, backend))
    if len(reasons) == 1 and not any(service["backend"] for service in operators.values()):
        display.heading(f"Operators on {device}: none, {next(iter(reasons))}")
        return
    display.heading(f"Operators on {device} and their backends")
    display.lines(_indented([[name, service["backend"] or "none"] for name, service in operators.items()]))
    for reason, cases in reasons.items():
        backends = dict.fromkeys(backend for _, backend in cases)
        for backend in backends:
            concerned = [operator for operator, other in cases if other == backend]
            of = "any operator" if len(concerned) == len(operators) else ", ".join(concerned)
            display.say(f"  not {backend} for {of}: {reason}", style="dim")


def _indented(rows: list[list[Any]]) -> list[str]:
    widths = max(len(row[0]) for row in rows)
    return [f"  {name:<{widths}}  {value}" for name, value in rows]
