"""Command line: `python -m ftwt_jax COMMAND --FLAG=VALUE ...`."""

import _thread
import io
import logging
import os
import sys
import threading
import traceback
import warnings
from typing import Any

from ftwt_jax.commands.parse import load_command, parse, usage
from ftwt_jax.ctrl_c import INTERRUPTED, loaded
from ftwt_jax.errors import (
    MissingPackageWarning,
    RunWarning,
    SkippedImageWarning,
    UserError,
    one_line,
    shortened,
    storage_errors,
)
from ftwt_jax.version import __version__

# As of a program that the signal of a closed pipe ends.
_UNREAD = 141
# Seconds after which a Ctrl-C that was dropped is tried again.
_AGAIN = 0.05
_NO_MEMORY = (
    "the memory of the device is full: if another program uses it, set XLA_PYTHON_CLIENT_PREALLOCATE=false for both "
    "or wait; else choose a smaller batch, or config.accumulate"
)
# Packages whose name differs from that of their module.
_PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn"}
_show_warning = warnings.showwarning


def _warn(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
    if issubclass(category, (SkippedImageWarning, MissingPackageWarning, RunWarning)):
        print(f"ftwt: warning: {message}", file=sys.stderr)
    else:
        _show_warning(message, category, *rest, **options)


def hook_unraisable() -> None:
    """Handles exceptions that Python can pass on to nobody, those in a destructor or a callback of the collector."""
    # When a checkpoint cannot be written, Orbax leaves tasks behind that would report the error a second time.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    usual = sys.unraisablehook

    def hook(event: Any) -> None:
        if issubclass(event.exc_type, KeyboardInterrupt):
            # Python drops it, and the program would go on: JAX has such callbacks. A moment later, it gets through.
            again = threading.Timer(_AGAIN, _thread.interrupt_main)
            again.daemon = True
            again.start()
        elif not (isinstance(event.exc_value, RuntimeError) and "Event loop is closed" in str(event.exc_value)):
            usual(event)

    sys.unraisablehook = hook


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0 if it went well; 2, with one line on stderr, for a mistake that the user can correct; 75 if SIGTERM stopped it,
    with everything saved; 76 if another process of the run was lost; 130 if interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"ftwt_jax {__version__}")
        return 0
    # Logs of Orbax, Grain and XLA do not belong in the output of a command; their errors come back as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from absl import logging as absl_logging
    from jax.errors import JaxRuntimeError
    from rich.console import Console

    from ftwt_jax.ops.compiling import keep_compiled
    from ftwt_jax.parallel.preemption import PREEMPTED, Preempted, said
    from ftwt_jax.parallel.processes import LOST, Lost, is_first, lost_process

    absl_logging.set_verbosity(absl_logging.FATAL)
    warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")  # It recompiles instead.
    warnings.showwarning = _warn
    warnings.filterwarnings(
        "ignore", module="PIL"
    )  # Pillow warns of files that it reads all the same, without naming them.
    try:
        values = parse(arguments[0], arguments[1:])
        if values is not None:
            keep_compiled()
            command = load_command(arguments[0])
            loaded()
            command.run(values, Console())
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "ftwt_jax"):
            raise
        package = _PACKAGES.get(module, module)
        reason = f"this command needs the package {package}, which is not installed: pip install {package}"
        print(f"ftwt: error: {reason}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except storage_errors(UserError) as error:
        print(f"ftwt: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command continues from the newest checkpoint" if arguments[0] == "train" else ""
        print(f"ftwt: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except Preempted as stopped:
        if is_first():
            print(said(str(stopped)), file=sys.stderr)
        return PREEMPTED
    except (Lost, JaxRuntimeError, ValueError) as error:
        lost = error if isinstance(error, Lost) else lost_process(error)
        if lost is None and isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            print(f"ftwt: error: {_NO_MEMORY} ({shortened(error)})", file=sys.stderr)
            return 2
        if lost is None:
            raise
        print(f"ftwt: error: {lost}; the same command continues from the newest checkpoint", file=sys.stderr)
        return LOST
    return 0


def run() -> None:
    """The program: `main`, and the end of the process."""
    from ftwt_jax.parallel.preemption import end_when_told
    from ftwt_jax.parallel.processes import leave

    hook_unraisable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Names of files may be such as no encoding writes.
    if sys.argv[1:2] == ["train"]:
        end_when_told()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` after some lines. Nothing more is to be written there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _UNREAD
    except Exception:
        # A bug of ours must not keep the other processes waiting for this one.
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    leave(status)
    if status == INTERRUPTED:
        # A compilation that is still running would delay the exit, or crash it.
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
