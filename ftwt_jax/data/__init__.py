"""Data sets by name. A new one is one file here and one line in `REGISTRY`."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ftwt_jax.data.digits import load_digits
from ftwt_jax.data.fashion_mnist import describe_fashion_mnist, load_fashion_mnist
from ftwt_jax.data.folder import describe_folder, load_folder
from ftwt_jax.data.source import Dataset
from ftwt_jax.data.tfds_sets import describe_tfds, load_tfds
from ftwt_jax.errors import UserError, unknown_name


class Loader(NamedTuple):
    """How to get a data set.

    Attributes:
      load: from the options of `config.data` to the data set; its parameters are the options that exist.
      describe: the same without images (see `build_blank`), from all options and `num_classes`; None if loading is as
        cheap.
    """

    load: Callable[..., Dataset]
    describe: Callable[..., Dataset] | None = None


REGISTRY: dict[str, Loader] = {
    "digits": Loader(load_digits),
    "fashion_mnist": Loader(load_fashion_mnist, describe_fashion_mnist),
}
# Families of data sets, named KIND:PLACE; the place is the first argument of both functions.
FAMILIES: dict[str, Loader] = {
    "tfds": Loader(load_tfds, describe_tfds),
    "folder": Loader(load_folder, describe_folder),
}


# The field of `config.data` that is no loader's: where training keeps the images (see `resident.place`).
ON_DEVICE = "on_device"


def absolute_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a data set with its folders made absolute, so that they hold from any current directory."""
    changed = dict(options)
    kind, _, place = str(options["name"]).partition(":")
    if kind == "folder" and place:
        changed["name"] = f"folder:{os.path.abspath(os.path.expanduser(place))}"
    if options.get("data_dir") and "://" not in options["data_dir"]:
        changed["data_dir"] = os.path.abspath(os.path.expanduser(options["data_dir"]))
    return changed


def load_dataset(name: str, **options: Any) -> Dataset:
    """Loads a data set.

    Args:
      name: `digits`, `fashion_mnist`, `tfds:NAME` or `folder:PATH`.
      **options: arguments of its loader; None stands for the loader's default.

    Raises:
      UserError: unknown name, bad option, or data that are missing or cannot be used.
    """
    loader, place, given, _ = _find(name, options)
    return loader.load(*place, **given)


def describe_dataset(name: str, num_classes: int | None = None, **options: Any) -> Dataset:
    """A data set as `load_dataset` would load it, but without images, mean and deviation. Downloads nothing.

    Args:
      name: see `load_dataset`; the data need not be there.
      num_classes: overrides the data set's own; needed where that cannot be found out.
      **options: as for `load_dataset`.

    Raises:
      UserError: unknown name or option, or an unknown number of classes.
    """
    loader, place, given, defaults = _find(name, options)
    if loader.describe is not None:
        return loader.describe(*place, num_classes=num_classes, **{**defaults, **given})
    dataset = loader.load(*place, **given)
    return dataset if num_classes is None else dataclasses.replace(dataset, num_classes=num_classes)


def other_options(
    options: Mapping[str, Any], name: str, image_shape: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """The options of a data set for another one, so that its images are prepared in the same way.

    If the other data set is of another kind, its usual splits are used; a `data_dir` that does not exist is dropped.

    Args:
      options: those of `config.data`.
      name: the other data set.
      image_shape: (H, W, channels) that the network was trained with, where `image_size` leaves it to the data set.
    """
    rest = {option: value for option, value in options.items() if option != "name"}
    before, _, given, usual = _find(str(options["name"]), rest)
    after, _, _, known = _find(name, {})
    size = {"image_size": image_shape[0]} if image_shape else {}
    chosen = {"augment": "crop", **usual, **size, **given}
    if before is not after:
        chosen = {option: value for option, value in chosen.items() if not option.endswith("_split")}
    folder = chosen.get("data_dir")
    if folder and "://" not in folder and not os.path.isdir(folder):
        del chosen["data_dir"]
    kept = {option: value for option, value in chosen.items() if option in known}
    return {**dict.fromkeys(options), ON_DEVICE: options.get(ON_DEVICE), **kept, "name": name}


def _find(name: str, options: Mapping[str, Any]) -> tuple[Loader, list[str], dict[str, Any], dict[str, Any]]:
    """The loader of a data set, its place if it is of a family, the options that are set, and the defaults of all."""
    kind, colon, place = name.partition(":")
    loader = (FAMILIES if colon else REGISTRY).get(kind)
    if loader is None:
        if os.path.isdir(os.path.expanduser(name)):
            raise UserError(f"unknown data set {name!r}: for the images in that folder, write folder:{name}")
        raise unknown_name("data set", name, [*REGISTRY, *(f"{family}:{place or name}" for family in FAMILIES)])
    options = {option: value for option, value in options.items() if option != ON_DEVICE}
    parameters = inspect.signature(loader.load).parameters
    defaults = {option: parameter.default for option, parameter in parameters.items() if option != "place"}
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in defaults:
            raise unknown_name(f"option of the data set {kind}", option, list(defaults))
    return loader, [place] if colon else [], given, defaults
