"""Help, version and `xsmoe info`."""

import inspect
import json
import re
import subprocess
import sys

import pytest
import typer.main

import xsmoe
import xsmoe_kernels
from tests.cli.helpers import run, succeed
from xsmoe.cli import ORDER, app
from xsmoe.cli.run_config import DEFAULT_WINDOWS, MODEL_DEFAULTS
from xsmoe.nn import XSMoE
from xsmoe.stream import StreamConfig

COMMANDS = [[name] for name in ORDER] + [["prepare", name] for name in ("movielens", "table", "catalogue")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_every_parameter_has_help(command: list[str]) -> None:
    out = succeed(*command, "--help")
    assert "Usage: " + " ".join(["xsmoe", *command]) in out
    found = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]  # type: ignore[attr-defined]
    assert found.help.split(".")[0].split()[0] in out
    assert all(parameter.help for parameter in found.params)


def test_commands_are_listed_in_the_order_of_use() -> None:
    out = succeed("--help")
    assert sorted(ORDER, key=lambda name: re.search(rf"│ {name} ", out).start()) == list(ORDER)  # type: ignore[union-attr]


@pytest.mark.parametrize("arguments", [[], ["prepare"]])
def test_missing_command_shows_help(arguments: list[str]) -> None:
    assert "Usage:" in succeed(*arguments)


def test_train_options_state_the_true_defaults() -> None:
    stated = {}
    for parameter in typer.main.get_command(app).commands["train"].params:  # type: ignore[attr-defined]
        if match := re.search(r"Default: (.+)\.$", parameter.help or ""):
            stated[parameter.name] = match[1]
    config, model = StreamConfig(), inspect.signature(XSMoE).parameters
    true = {name: str(value) for name, value in config.to_dict().items()}
    true |= {"expand": "no", "prune": "no", "windows": str(DEFAULT_WINDOWS), "modalities": "all", "missing": "drop"}
    true |= {"rank": str(model["rank"].default), "out_dim": str(model["out_dim"].default), "top_k": "all"}
    best = StreamConfig(keep="best")
    for name in ("epochs", "patience"):
        true[name] = f"{getattr(config, name)}, with --keep best {getattr(best, name)}"
    true |= {"ids": "yes", "condition": MODEL_DEFAULTS["default"]["condition"]}
    true |= {"graph": "no", "store_gib": "a quarter of the free memory"}
    assert MODEL_DEFAULTS["default"]["ids"]
    assert not config.expand
    assert not config.prune
    assert not config.graph
    assert config.store_gib is None
    assert stated == true


def test_version() -> None:
    assert succeed("--version").strip() == xsmoe_kernels.__version__
    assert run("--version").err == ""


def test_info_names_a_backend_for_every_operator() -> None:
    out = succeed("info")
    for operator, devices in xsmoe_kernels.info()["operators"].items():
        assert re.search(rf"^  {operator} +{devices['cpu']['backend']}$", out, re.MULTILINE)
    assert json.loads(succeed("info", "--json")) == json.loads(json.dumps(xsmoe_kernels.info()))


def test_help_does_not_import_torch() -> None:
    code = "import sys, xsmoe, xsmoe.cli; sys.exit(not {'torch', 'numpy'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"XSMoE", "StreamingTrainer"} <= set(dir(xsmoe))
    assert xsmoe.XSMoE is XSMoE
    with pytest.raises(AttributeError, match="module 'xsmoe' has no attribute 'XSMOE'"):
        _ = xsmoe.XSMOE
