"""Compatibility of checkpoints and runs."""

from pathlib import Path
from typing import Any

import pytest

from tests.stream import tiny
from xsmoe.stream import StreamConfig
from xsmoe.stream.config import result_settings
from xsmoe.stream.state.compatibility import compatibility_record, require_compatible_checkpoint


def served(saved: dict[str, Any], **options: Any) -> None:
    model, features = tiny.model(), tiny.features()
    state = compatibility_record(StreamConfig(**saved), model, features)
    require_compatible_checkpoint(Path("run"), state, StreamConfig(**options), model, features)


def test_cache_limit_and_gpu_may_change() -> None:
    served({"store_gib": 1.0}, store_gib=None)
    served({"device": "cuda"}, device="cuda:3", store_gib=0.0)


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        ({}, {"device": "cuda"}, "config.device was 'cpu', is now 'cuda'"),
        ({"graph": True}, {}, "config.graph was True, is now False"),
        ({"lr": 0.01}, {"seed": 1}, "config.lr was 0.01, is now 0.001; config.seed was 0, is now 1"),
    ],
)
def test_settings_that_affect_results_must_not_change(
    saved: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        served(saved, **options)


def test_run_may_get_more_items_but_not_fewer() -> None:
    model, features, config = tiny.model(), tiny.features(), tiny.config()
    state = compatibility_record(config, model, features, num_items=10)
    require_compatible_checkpoint(Path("run"), state, config, model, features)
    state["num_items"] = 41
    with pytest.raises(ValueError, match="run was trained on 41 items, but stream.features has 40"):
        require_compatible_checkpoint(Path("run"), state, config, model, features)
    state = compatibility_record(config, model, tiny.features(seed=1))
    with pytest.raises(ValueError, match="run was trained on other hidden states"):
        require_compatible_checkpoint(Path("run"), state, config, model, features)


def test_result_settings_exclude_settings_without_influence() -> None:
    assert result_settings({"device": "cuda:1", "store_gib": 2, "lr": 0.1}) == {"device": "cuda", "lr": 0.1}
