"""Block sizes of the Triton kernels of a side level, by architecture and precision."""

from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere


def _of(names: str, sizes: str, num_warps: int, num_stages: int) -> Config:
    blocks = dict(zip(names.split(), map(int, sizes.split()), strict=True))
    return Config(blocks, num_warps, num_stages)


_GATE = "BLOCK_N BLOCK_E BLOCK_K"
GATE = Table(
    "side_moe.gate",
    {
        ("sm_80", "half"): _of(_GATE, "32 16 128", 4, 3),
        ("sm_90", "half"): _of(_GATE, "32 16 128", 4, 4),
        ("sm_100", "half"): _of(_GATE, "32 16 128", 4, 4),
        ("gfx942", "half"): _of(_GATE, "32 16 128", 4, 2),
        ("sm_80", "tf32"): _of(_GATE, "32 16 64", 4, 3),
        ("sm_90", "tf32"): _of(_GATE, "32 16 64", 4, 4),
        ("sm_100", "tf32"): _of(_GATE, "32 16 32", 4, 4),
        **everywhere(_of(_GATE, "32 16 32", 4, 2), "ieee"),
    },
    interpreted=_of(_GATE, "32 16 64", 4, 1),
    candidates=(_of(_GATE, "64 16 64", 4, 4), _of(_GATE, "16 16 128", 4, 4), _of(_GATE, "64 16 128", 8, 3)),
)

_TILE = "BLOCK_N BLOCK_C BLOCK_K"
_TILE_DEFAULTS = {
    ("sm_80", "half"): _of(_TILE, "128 128 32", 8, 4),
    ("sm_90", "half"): _of(_TILE, "128 128 64", 8, 4),
    ("sm_100", "half"): _of(_TILE, "128 128 64", 8, 4),
    ("gfx942", "half"): _of(_TILE, "128 128 64", 8, 2),
    ("sm_80", "tf32"): _of(_TILE, "128 64 32", 8, 3),
    ("sm_90", "tf32"): _of(_TILE, "128 128 32", 8, 4),
    ("sm_100", "tf32"): _of(_TILE, "128 64 32", 8, 4),
    **everywhere(_of(_TILE, "64 64 16", 8, 2), "ieee"),
}
_TILE_CANDIDATES = (
    _of(_TILE, "128 128 64", 8, 4),
    _of(_TILE, "128 64 64", 4, 4),
    _of(_TILE, "64 128 64", 4, 4),
    _of(_TILE, "128 256 64", 8, 3),
    _of(_TILE, "64 64 64", 4, 4),
    _of(_TILE, "64 64 32", 4, 3),
)
# With two products in its epilogue, a wider tile would spill.
_GRADIENT_DEFAULTS = _TILE_DEFAULTS | {
    ("sm_80", "half"): _of(_TILE, "128 64 32", 8, 4),
    ("sm_90", "half"): _of(_TILE, "128 64 64", 8, 4),
    ("sm_100", "half"): _of(_TILE, "128 64 64", 8, 4),
    ("sm_90", "tf32"): _of(_TILE, "128 64 32", 8, 4),
    ("sm_100", "tf32"): _of(_TILE, "128 64 32", 8, 4),
}
HIDDEN = Table("side_moe.hidden", _TILE_DEFAULTS, _of(_TILE, "32 64 64", 4, 1), _TILE_CANDIDATES)
HIDDEN_GRADIENT = Table("side_moe.hidden_gradient", _GRADIENT_DEFAULTS, _of(_TILE, "32 64 64", 4, 1), _TILE_CANDIDATES)

_MIX = "BLOCK_N BLOCK_D BLOCK_K"
MIXTURE = Table(
    "side_moe.mixture",
    {
        ("sm_80", "half"): _of(_MIX, "128 64 64", 8, 3),
        ("sm_90", "half"): _of(_MIX, "128 128 64", 8, 4),
        ("sm_100", "half"): _of(_MIX, "128 128 64", 8, 4),
        ("gfx942", "half"): _of(_MIX, "128 64 64", 8, 2),
        ("sm_80", "tf32"): _of(_MIX, "64 64 32", 4, 3),
        ("sm_90", "tf32"): _of(_MIX, "128 64 32", 8, 4),
        ("sm_100", "tf32"): _of(_MIX, "128 64 32", 8, 4),
        **everywhere(_of(_MIX, "32 64 16", 4, 2), "ieee"),
        ("gfx942", "ieee"): _of(_MIX, "64 64 16", 8, 2),
    },
    interpreted=_of(_MIX, "32 64 32", 4, 1),
    candidates=(
        _of(_MIX, "128 64 64", 8, 4),
        _of(_MIX, "64 128 64", 4, 4),
        _of(_MIX, "64 128 64", 8, 4),
        _of(_MIX, "64 64 64", 4, 4),
        _of(_MIX, "64 64 32", 4, 3),
    ),
)
_ROWS = "BLOCK_N BLOCK_D BLOCK_K BLOCK_E"
ROW_GRADIENT = Table(
    "side_moe.row_gradient",
    {
        ("sm_80", "half"): _of(_ROWS, "128 128 32 16", 8, 3),
        ("sm_90", "half"): _of(_ROWS, "128 128 64 16", 8, 4),
        ("sm_100", "half"): _of(_ROWS, "128 128 64 16", 8, 4),
        ("gfx942", "half"): _of(_ROWS, "128 128 64 16", 8, 2),
        ("sm_80", "tf32"): _of(_ROWS, "128 64 32 16", 8, 3),
        ("sm_90", "tf32"): _of(_ROWS, "128 64 32 16", 8, 4),
        ("sm_100", "tf32"): _of(_ROWS, "128 64 32 16", 8, 4),
        **everywhere(_of(_ROWS, "64 64 16 16", 8, 2), "ieee"),
    },
    interpreted=_of(_ROWS, "32 64 32 16", 4, 1),
    candidates=(
        _of(_ROWS, "128 64 64 16", 4, 4),
        _of(_ROWS, "64 128 64 16", 4, 4),
        _of(_ROWS, "128 256 64 16", 8, 3),
        _of(_ROWS, "64 64 32 16", 4, 3),
    ),
)
_WEIGHT = "BLOCK_C BLOCK_D BLOCK_K"
WEIGHT_GRADIENT = Table(
    "side_moe.weight_gradient",
    {
        ("sm_80", "half"): _of(_WEIGHT, "64 128 64", 4, 3),
        ("sm_90", "half"): _of(_WEIGHT, "64 128 64", 4, 4),
        ("sm_100", "half"): _of(_WEIGHT, "64 128 64", 4, 4),
        ("gfx942", "half"): _of(_WEIGHT, "64 128 64", 4, 2),
        ("sm_80", "tf32"): _of(_WEIGHT, "64 64 32", 4, 3),
        ("sm_90", "tf32"): _of(_WEIGHT, "64 64 32", 4, 4),
        ("sm_100", "tf32"): _of(_WEIGHT, "64 64 32", 4, 4),
        **everywhere(_of(_WEIGHT, "64 64 16", 8, 2), "ieee"),
    },
    interpreted=_of(_WEIGHT, "32 64 16", 4, 1),
    candidates=(_of(_WEIGHT, "64 64 64", 4, 4), _of(_WEIGHT, "64 256 64", 8, 3), _of(_WEIGHT, "64 64 32", 4, 4)),
)

BROADCAST = Table(
    "side_moe.broadcast", everywhere(_of("BLOCK_N BLOCK_D", "16 256", 4, 2)), _of("BLOCK_N BLOCK_D", "16 32", 4, 1)
)
_SLICED = "BLOCK_N SLICE"
COUNT = Table("side_moe.count", everywhere(_of(_SLICED, "512 4096", 4, 2)), _of(_SLICED, "32 64", 4, 1))
_COLUMNS = "BLOCK_N BLOCK_D SLICE"
COLUMN_SUM = Table(
    "side_moe.column_sum", everywhere(_of(_COLUMNS, "32 128 256", 4, 2)), _of(_COLUMNS, "16 32 48", 4, 1)
)
_SLICES = "BLOCK_N BLOCK_D"
ROW_SUM = Table("side_moe.row_sum", everywhere(_of(_SLICES, "32 64", 4, 2)), _of(_SLICES, "16 32", 4, 1))
_LOGITS = "BLOCK_N BLOCK_E BLOCK_D"
LOGIT_GRADIENT = Table(
    "side_moe.logit_gradient", everywhere(_of(_LOGITS, "16 16 64", 4, 2)), _of(_LOGITS, "32 16 64", 4, 1)
)
WEIGHT_SUM = Table("side_moe.weight_sum", everywhere(_of("BLOCK_D", "512", 4, 2)), _of("BLOCK_D", "32", 4, 1))
