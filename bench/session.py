"""What commands that measure do alike: how they begin, what they say meanwhile, and the cases that they leave."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench import machine, results
from bench.arguments import DTYPES
from bench.case import drawn, without_inputs
from bench.measure import Say
from bench.results import Case, Run
from bench.workload import Workload


def begin(device: torch.device, threads: int | None, *, timed: bool) -> dict[str, Any]:
    """Sets torch's threads, if their number was given, and prints and returns what the machine is."""
    if threads is not None:
        torch.set_num_threads(threads)
    facts = machine.describe(device)
    print(machine.line(facts), flush=True)
    if timed and machine.busy(facts):
        print(
            "\n**Other programs keep this machine busy: trust ratios more than times, and neither much.**", flush=True
        )
    return facts


def speaker(started: float, label: str = "") -> Say:
    """Says on a terminal what goes on, in one line, and for how long since `started`; an empty text takes it away."""
    live = sys.stderr.isatty()

    def say(text: str) -> None:
        # A terminal shows what goes on now; a log need not keep it.
        if live:
            about = f" ({label})" if label else ""
            line = f"[{time.monotonic() - started:6.1f} s] {text}{about}" if text else ""
            # Nothing takes a line away that goes on in the next.
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}\r", end="", file=sys.stderr, flush=True)

    return say


class Session:
    """The cases that a command measures one after the other, and the file that grows with them.

    Args:
        options: of the command line, checked.
        started: when the command began.
        timed: whether times are measured.
    """

    def __init__(self, options: argparse.Namespace, started: float, *, timed: bool) -> None:
        self.options, self.started = options, started
        self.device, self.dtype = torch.device(options.device), DTYPES[options.dtype]
        self.facts = begin(self.device, options.threads, timed=timed)
        self.cases: list[Case] = []

    def take(
        self, kind: type[Workload], sizes: Mapping[str, int], names: Sequence[str], measure: Callable[..., Case]
    ) -> Case:
        """A case, with all rows skipped if memory does not suffice for its inputs.

        `measure` is given the workload, the names, and `say`.
        """
        say = speaker(self.started, f"{kind.operator} {results.lettered(sizes)}")
        try:
            say("weights")
            workload, reason = drawn(kind, sizes, self.dtype, self.device, self.options.seed)
            if workload is None:
                case = without_inputs(kind, sizes, self.dtype, self.device, names, reason)
            else:
                case = measure(workload, names, say=say)
        finally:
            say("")
        self.cases.append(case)
        # After every case, so that who is stopped loses only what was going on.
        if self.options.json is not None:
            results.save(self.run(), self.options.json)
        return case

    def run(self) -> Run:
        """What was measured so far."""
        return Run(self.options.given, self.facts, self.cases, time.monotonic() - self.started)

    def any_refused(self) -> bool:
        """Whether a row was refused; names all that were."""
        refused = self.run().refused()
        for case, row in refused:
            print(f"refused: {case.operator} {row.variant} at {case.sizes}: {row.reason}", file=sys.stderr)
        return bool(refused)
