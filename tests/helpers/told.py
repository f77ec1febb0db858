"""The program, told to stop in a phase that it names: python -m tests.helpers.told PHASE COMMAND --FLAG=VALUE ...

SIGTERM comes while the first batch of that phase is being computed. A phase that then begins another two ends with
status 3. The moment is written to the file that TOLD_AT names.
"""

import functools
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp

from ftwt_jax.__main__ import run
from ftwt_jax.budget import batch_statistics, keeper
from ftwt_jax.commands import evaluate, train
from ftwt_jax.training import evaluator, loop

WENT_ON = 3
# Seconds that a batch takes from then on.
BATCH = 0.3
# Of each phase: whose method (or module's function) it is, and the module that computes its batches.
PHASES = {
    "evaluation": (loop._Loop, "_evaluate", evaluator),
    "estimate": (train, "choose_r", evaluator),
    "calibration": (keeper.BudgetKeeper, "after", evaluator),
    "statistics": (keeper.BudgetKeeper, "after", batch_statistics),
    "final evaluation": (train, "evaluate_run", evaluator),
    "evaluate": (evaluate, "evaluate_run", evaluator),
}
COMPILATION = "compilation"


def tell() -> None:
    if os.environ.get("JAX_PROCESS_ID") == "0":
        return  # Of several processes, another one is told.
    pathlib.Path(os.environ["TOLD_AT"]).write_text(repr(time.time()))
    os.kill(os.getpid(), signal.SIGTERM)


def tell_in(phase: str, most: int) -> None:
    """Has this process told to stop at the first batch of a phase; `most` batches may follow."""
    owner, name, computes = PHASES[phase]
    method, put_batch = getattr(owner, name), computes.put_batch
    begun = 0
    inside = False

    def within(*args: Any, **options: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return method(*args, **options)
        finally:
            inside = False

    def put(batch: Any, mesh: Any) -> Any:
        nonlocal begun
        begun += inside
        if inside and begun == 1:
            tell()
        if inside and begun >= 1:
            time.sleep(BATCH)
        if begun > 1 + most:
            os._exit(WENT_ON)
        return put_batch(batch, mesh)

    setattr(owner, name, functools.wraps(method)(within))
    computes.put_batch = put


def tell_in_compilation() -> None:
    """Has this process told to stop while the main thread is in the compiler."""

    def long(x: jax.Array) -> jax.Array:
        for index in range(400):
            x = jnp.tanh(x @ x + index)
        return x

    def compile_(*args: Any) -> None:
        lowered = jax.jit(long).lower(jnp.ones((64, 64)))
        threading.Timer(0.5, tell).start()
        lowered.compile()
        os._exit(WENT_ON)

    evaluator.Evaluator.compile = compile_


if __name__ == "__main__":
    phase = sys.argv.pop(1)
    tell_in_compilation() if phase == COMPILATION else tell_in(phase, int(os.environ.get("TOLD_MOST", "1")))
    run()
