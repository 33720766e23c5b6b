"""How a command of the bench ends: with its exit code, and quietly where nobody reads what it prints any more."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

READER_GONE = 141
"""What a shell calls the end of a program that its closed pipe has ended, 128 and SIGPIPE."""


def leave(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with what it returns, or with `READER_GONE` after `... | head`."""
    try:
        try:
            code: int | str | None = main()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        gone = next((stream for stream in (sys.stdout, sys.stderr) if _closed(stream)), None)
        if gone is None:
            # Some other pipe than the reader's: an error like any.
            raise
        # Python flushes it once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())
        code = READER_GONE
    sys.exit(code)


def _closed(stream: TextIO) -> bool:
    """Whether nobody reads a stream any more; somebody who does gets an empty line."""
    try:
        print(file=stream, flush=True)
    except BrokenPipeError:
        return True
    return False
