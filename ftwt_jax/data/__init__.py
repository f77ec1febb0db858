"""Data sets by name. A new one is one file here and one line in `REGISTRY`."""

import inspect
from collections.abc import Callable
from typing import Any

from ftwt_jax.data.digits import load_digits
from ftwt_jax.data.source import Dataset
from ftwt_jax.errors import unknown_name

REGISTRY: dict[str, Callable[..., Dataset]] = {"digits": load_digits}


def load_dataset(name: str, **options: Any) -> Dataset:
    """Loads a data set; raises `UserError` for an unknown name or a bad option."""
    if name not in REGISTRY:
        raise unknown_name("data set", name, REGISTRY)
    known = list(inspect.signature(REGISTRY[name]).parameters)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of the data set {name}", option, known)
    return REGISTRY[name](**options)
