"""Data sets by name. A new one is one file here and one line in `REGISTRY`."""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from ftwt_jax.data.digits import load_digits
from ftwt_jax.data.fashion_mnist import load_fashion_mnist
from ftwt_jax.data.folder import load_folder
from ftwt_jax.data.source import Dataset
from ftwt_jax.data.tfds_sets import load_tfds
from ftwt_jax.errors import unknown_name

REGISTRY: dict[str, Callable[..., Dataset]] = {"digits": load_digits, "fashion_mnist": load_fashion_mnist}
# Those of which there are many: what follows the colon is their first argument.
FAMILIES: dict[str, Callable[..., Dataset]] = {"tfds": load_tfds, "folder": load_folder}


def absolute_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a data set with its folders made absolute, so that they hold from any current directory."""
    found = dict(options)
    kind, _, place = str(options["name"]).partition(":")
    if kind == "folder" and place:
        found["name"] = f"folder:{os.path.abspath(os.path.expanduser(place))}"
    if options.get("data_dir") and "://" not in options["data_dir"]:
        found["data_dir"] = os.path.abspath(os.path.expanduser(options["data_dir"]))
    return found


def load_dataset(name: str, **options: Any) -> Dataset:
    """Loads a data set: `digits`, `fashion_mnist`, `tfds:NAME` or `folder:PATH`.

    Args:
      name: which one.
      **options: arguments of its loader; those that are None are left to it.

    Raises:
      UserError: unknown name, bad option, or data that are not there or cannot be used.
    """
    kind, colon, place = name.partition(":")
    load = (FAMILIES if colon else REGISTRY).get(kind)
    if load is None:
        raise unknown_name("data set", name, [*REGISTRY, *(f"{family}:{place or name}" for family in FAMILIES)])
    given = {option: value for option, value in options.items() if value is not None}
    known = [option for option in inspect.signature(load).parameters if option != "place"]
    for option in given:
        if option not in known:
            raise unknown_name(f"option of the data set {kind}", option, known)
    return load(place, **given) if colon else load(**given)
