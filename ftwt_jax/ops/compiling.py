"""How everything here is compiled."""

import functools
import os
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp

# XLA's newer kernels for convolutions and matrix products on a CPU: inference up to twice as fast, weight gradients
# three times. The name is an experimental one, so a release of JAX without it must not stop anyone.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


@functools.cache
def compiler_options(backend: str | None = None) -> dict[str, Any]:
    """What to pass as `jax.jit(…, compiler_options=…)`: the fast kernels on a CPU, nothing elsewhere.

    Args:
      backend: "cpu", "gpu" or "tpu"; None: where JAX runs by default.
    """
    if (backend or jax.default_backend()) != "cpu":
        return {}
    try:
        jax.jit(jnp.negative, compiler_options=_CPU).lower(jnp.zeros(1)).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(_CPU)


def keep_compiled() -> None:
    """Keeps what is compiled in the user's cache folder, so that the same program starts at once the next time.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder, and an empty one none. What cannot be read or written there is
    compiled as if nothing had been kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder()))


def cache_folder() -> pathlib.Path:
    """Where compiled code is kept for this user and machine; it need not exist."""
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    # A home folder may be shared by machines whose processors differ.
    return caches / "ftwt_jax" / platform.node()
