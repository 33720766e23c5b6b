"""A smoke test of an installed wheel: the native kernels are loaded, agree with the reference, and train a module."""

import subprocess
import sys
from pathlib import Path

import torch

import xsmoe_kernels
from xsmoe import XSMoE
from xsmoe_kernels import side_moe, use_backend


def step(backend: str) -> list[torch.Tensor]:
    """Return the output of `side_moe` on a backend, and the gradients of all inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    rows, width, experts, rank = 33, 64, 3, 16
    inputs = [draw(rows, width), draw(rows, width), draw(experts + 1, width, scale=0.1)]
    inputs += [draw(experts, rank, width, scale=0.1), draw(experts, rank, width, scale=0.1)]
    with use_backend(backend):
        out = side_moe(*inputs)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def main() -> None:
    """Raise AssertionError if the installation does not work."""
    package = Path(xsmoe_kernels.__file__).parent
    assert Path(sys.prefix) in package.parents, f"{package} is not in {sys.prefix}"
    native = xsmoe_kernels.info()["native"]
    assert "unavailable" not in native, native["unavailable"]
    assert Path(native["library"]).parent == package, native["library"]
    for found, expected in zip(step("native"), step("reference"), strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm(), (found, expected)
    with use_backend("native"):
        model = XSMoE(modalities=("text",), dim=64, num_levels=2, rank=16, out_dim=32)
        model({"text": torch.randn(8, 3, 64)}).square().mean().backward()
    ran = subprocess.run([Path(sys.executable).parent / "xsmoe", "info"], capture_output=True, text=True)
    assert ran.returncode == 2, ran
    assert "pip install 'xsmoe[train]'" in ran.stderr, ran.stderr
    print(f"xsmoe {xsmoe_kernels.__version__} on Python {sys.version.split()[0]}, torch {torch.__version__}:")
    print(f"native kernels loaded ({native['tier']}), equal to the reference; the command line names its extra")


if __name__ == "__main__":
    main()
