"""The generated streams of `python -m bench quality`: parameters that were fixed before anything was tuned on them."""

from dataclasses import dataclass

from xsmoe.cli.commands.demo import DemoSettings


@dataclass(frozen=True)
class Preset:
    """A catalogue (see `xsmoe.data.write_catalogue`); each seed draws another one, with encoders of its own.

    Attributes:
        windows: of the stream.
        users: of a window; with regimes, of each regime.
        items, new_items: at the start, and arriving with each later window.
        returning: regimes that alternate; 0 for the drift.
        epochs: the most epochs of a window.
    """

    windows: int
    users: int
    items: int
    new_items: int
    returning: int
    epochs: int


_DEMO = DemoSettings()

CATALOGUE = Preset(_DEMO.windows, _DEMO.users, _DEMO.items, new_items=80, returning=0, epochs=_DEMO.epochs)
"""The demonstration's."""

RETURNING = Preset(windows=12, users=400, items=500, new_items=40, returning=4, epochs=_DEMO.epochs)
"""Four regimes, each active in three windows and absent for three between two of them."""

PRESETS = {"catalogue": CATALOGUE, "returning": RETURNING}
