"""The exit of a command: its exit code, and no traceback if nobody reads its output any more."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

BROKEN_PIPE = 141
"""128 + SIGPIPE: the shell's exit code of a program that a closed pipe has ended."""


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code, or with `BROKEN_PIPE` after `... | head`."""
    try:
        try:
            code: int | str | None = main()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        closed = next((stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)), None)
        if closed is None:
            # The error belongs to another pipe.
            raise
        # Python flushes the stream again at exit, and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), closed.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


def _is_closed(stream: TextIO) -> bool:
    """Return whether the reader of a stream is gone. An existing reader gets an empty line."""
    try:
        print(file=stream, flush=True)
    except BrokenPipeError:
        return True
    return False
