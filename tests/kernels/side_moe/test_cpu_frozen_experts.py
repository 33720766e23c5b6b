"""FrozenExperts on the native kernels: packed once, and packed again or rejected after changes."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers.native_library import needs_library
from tests.kernels.helpers.native_side_moe import Call, native_results
from tests.kernels.helpers.side_level import Level, make_level, to
from xsmoe.nn import ExpertBank
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, use_backend

pytestmark = needs_library

DTYPES = (torch.float32, torch.bfloat16)

plain_level = partial(make_level, requires_grad=False)
"""Return a level without gradients."""


def test_frozen_experts_give_the_bits_of_experts_that_are_packed_in_every_call() -> None:
    for dtype in DTYPES:
        level = plain_level(67, 50, 5, 13, dtype=dtype)
        for num_frozen in (1, 5):
            apart, together = (
                native_results(level, Call(num_frozen=num_frozen, apart=apart)) for apart in (True, False)
            )
            for name, value in apart.items():
                if name in ("gradient of down", "gradient of up"):
                    assert torch.equal(value, together[name][num_frozen:]), name
                else:
                    assert torch.equal(value, together[name]), name


def frozen_level(dtype: torch.dtype = torch.float32) -> tuple[Level, FrozenExperts]:
    level = plain_level(20, 24, 4, 8, dtype=dtype)
    frozen = FrozenExperts(level.down[:3].clone(), level.up[:3].clone())
    return level._replace(down=level.down[3:], up=level.up[3:]), frozen


@pytest.mark.parametrize("name", ["down", "up"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_change_of_frozen_weights_in_place_is_noticed(name: str, autocast: bool) -> None:
    level, frozen = frozen_level()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), use_backend("native"):
        before = side_moe(*level, frozen=frozen)
        with torch.no_grad():
            getattr(frozen, name)[1].mul_(2)
        after = side_moe(*level, frozen=frozen)
        fresh = side_moe(*level, frozen=FrozenExperts(frozen.down.clone(), frozen.up.clone()))
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_a_backward_uses_the_frozen_weights_of_its_forward_or_raises() -> None:
    level, frozen = frozen_level()
    x = level.x.clone().requires_grad_()
    with use_backend("native"):
        y = side_moe(x, *level[1:], frozen=frozen)
    frozen.up.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_casts_and_packs_frozen_experts_once() -> None:
    level, frozen = frozen_level()
    packs, casts = set(), set()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16), use_backend("native"):
            y = side_moe(*level, frozen=frozen)
        narrow = frozen.to(torch.bfloat16)
        pack = narrow.pack()
        assert pack is not None
        packs.add(pack.data_ptr())
        casts.add(narrow.down.data_ptr())
    assert len(packs) == len(casts) == 1
    with use_backend("native"):
        expected = side_moe(*to(level, torch.bfloat16), frozen=narrow)
    assert torch.equal(y, expected)


def test_autocast_packs_no_weights_that_it_does_not_read() -> None:
    level = plain_level(20, 24, 4, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), use_backend("native"):
        frozen = FrozenExperts(level.down[:3], level.up[:3])
        side_moe(*level._replace(down=level.down[3:], up=level.up[3:]), frozen=frozen)
    assert frozen._derived.prepacked is None
    assert frozen.to(torch.bfloat16)._derived.prepacked is not None
    pack = frozen.pack()
    assert pack is not None
    assert frozen.pack() is pack


def test_a_bank_that_trains_under_autocast_has_one_prepacked_copy() -> None:
    bank = ExpertBank(24, 8)
    bank.expand()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), use_backend("native"):
            bank(torch.randn(20, 24), torch.randn(20, 24)).sum().backward()
    frozen = bank.frozen_experts()
    assert frozen is not None
    assert frozen._derived.prepacked is None
    assert frozen.to(torch.bfloat16)._derived.prepacked is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepacked_weights_need_twice_the_memory_of_the_operands(dtype: torch.dtype) -> None:
    level = plain_level(1, 768, 2, 64, dtype=dtype)
    pack = FrozenExperts(level.down, level.up).pack()
    assert pack is not None
    pairs = torch.ops.xsmoe_native.cpu_tier() in ("avx512_bf16", "amx")
    size = level.down.element_size() if pairs else 4
    assert pack.numel() == 2 * size * (level.down.numel() + level.up.numel())


def test_frozen_experts_are_packed_once() -> None:
    level, frozen = frozen_level()
    counters = Utilization(4)
    with torch.profiler.profile() as profile, use_backend("native"):
        for _ in range(3):
            side_moe(*level, frozen=frozen, utilization=counters)
    names = [event.name for event in profile.events()]
    assert names.count("xsmoe_native::side_moe") == 3
    assert names.count("xsmoe_native::pack_experts") == 0, "it was packed when it was made"


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["deep", "file"])
def test_copies_and_files_of_frozen_experts_leave_the_pack_behind(
    copied: Callable[[FrozenExperts], FrozenExperts],
) -> None:
    level, frozen = frozen_level()
    with torch.autocast("cpu", torch.bfloat16):
        side_moe(*level, frozen=frozen)
    twin = copied(frozen)
    assert frozen._derived.prepacked is not None
    assert frozen._derived.casts
    assert twin._derived.prepacked is None
    assert not twin._derived.casts
    with use_backend("native"):
        assert torch.equal(side_moe(*level, frozen=twin), side_moe(*level, frozen=frozen))
    weights = 2 * frozen.down.numel() * 4
    assert len(pickle.dumps(frozen)) < weights + 4000


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["deep", "file"])
@pytest.mark.parametrize("given", [Tensor.clone, Tensor.detach], ids=["whole", "alias"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_change_of_weights_that_were_copied_along_is_noticed(
    copied: Callable[[Any], Any], given: Callable[[Tensor], Tensor], autocast: bool
) -> None:
    level, frozen = frozen_level()
    down = given(frozen.down)
    twin_down, twin = copied((down, FrozenExperts(down, frozen.up)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), use_backend("native"):
        before = side_moe(*level, frozen=twin)
        twin_down.mul_(3)
        after = side_moe(*level, frozen=twin)
        fresh = side_moe(*level, frozen=FrozenExperts(twin_down, twin.up))
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_a_flat_copy_is_packed_and_notices_changes() -> None:
    level, frozen = frozen_level()
    twin = copy.copy(frozen)
    assert twin._derived.prepacked is not None
    with use_backend("native"):
        before = side_moe(*level, frozen=twin)
        frozen.down.mul_(3)
        after = side_moe(*level, frozen=twin)
        assert torch.equal(after, side_moe(*level, frozen=frozen))
    assert not torch.equal(after, before)


def test_prepacked_weights_of_other_experts_are_rejected() -> None:
    level, frozen = frozen_level()
    pack = frozen.pack()
    assert pack is not None
    arguments = (*level, frozen.down, frozen.up, pack[:-64], None, 0, True, False, "gelu", "native")
    with pytest.raises(ValueError, match="frozen_pack has .* it was packed for others"):
        torch.ops.xsmoe.side_moe(*arguments)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_frozen_experts_train_after_inference(autocast: bool, changed: bool) -> None:
    x, backbone, router, down, up = make_level(4, 16, 3, 4, dtype=torch.float32)
    frozen = FrozenExperts(down[:2].detach().clone(), up[:2].detach().clone())
    if changed:
        frozen.down.mul_(2)

    def run() -> Tensor:
        with use_backend("native"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return side_moe(x, backbone, router, down[2:], up[2:], frozen=frozen)

    with torch.inference_mode():
        seen = run()
    y = run()
    y.sum().backward()
    assert torch.equal(y, seen)
    assert down.grad is not None


def test_frozen_experts_changed_in_inference_mode_are_read_again() -> None:
    with torch.inference_mode(), use_backend("native"):
        x, backbone, router, down, up = plain_level(4, 16, 3, 4, dtype=torch.float32)
        frozen_down = down[:2].clone()
        frozen = FrozenExperts(frozen_down, up[:2].clone())
        side_moe(x, backbone, router, down[2:], up[2:], frozen=frozen)
        frozen_down.mul_(3)
        y = side_moe(x, backbone, router, down[2:], up[2:], frozen=frozen)
        joined = torch.cat([frozen_down, down[2:]])
        assert torch.equal(y, side_moe(x, backbone, router, joined, up))
