"""Compiler options, and the cache of compiled programs."""

import functools
import os
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp

# XLA's newer CPU kernels for convolutions and matrix products: inference is up to 2 times as fast, weight gradients 3
# times. The option is experimental, so releases of JAX without it must work too.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


@functools.cache
def compiler_options(backend: str | None = None) -> dict[str, Any]:
    """Value for `jax.jit(…, compiler_options=…)`: turns on the fast kernels on a CPU, empty elsewhere.

    Args:
      backend: "cpu", "gpu" or "tpu"; None is JAX's default backend.
    """
    if (backend or jax.default_backend()) != "cpu":
        return {}
    try:
        jax.jit(jnp.negative, compiler_options=_CPU).lower(jnp.zeros(1)).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(_CPU)


def keep_compiled() -> None:
    """Caches compiled programs in the user's cache folder, so that the same program starts quickly the next time.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder; empty, it turns the cache off. If a program cannot be read or
    written there, it is compiled as without a cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder()))


def cache_folder() -> pathlib.Path:
    """Where compiled programs of this user and machine are cached; it need not exist."""
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    # Machines with different processors may share a home folder.
    return caches / "ftwt_jax" / platform.node()
