"""Ctrl-C while the program loads its libraries: several answer it with a traceback, or crash.

Imported before anything else, this ends the process at once, until the command itself runs. It does nothing where
`ftwt_jax` is a library of another program.
"""

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130


def _is_program() -> bool:
    """Whether this process was started as `ftwt`, or as `python -m ftwt_jax`."""
    module = ["-m", "ftwt_jax"]
    started = (sys.orig_argv[place : place + 2] for place in range(len(sys.orig_argv)))
    return os.path.basename(sys.argv[0]) == "ftwt" or (sys.argv[0] == "-m" and module in started)


def _end(number: int, frame: Any) -> None:
    os.write(2, b"ftwt: interrupted\n")
    os._exit(INTERRUPTED)


def loaded() -> None:
    """From here on, Ctrl-C raises `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Where Ctrl-C is ignored, as in a background job of a shell, it stays so.
if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
