"""Whether a checkpoint is of the data and the network that a run has now; each check raises `UserError` if not."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath, as_text
from ftwt_jax.workdir import CONFIG


def check_size(path: AnyPath, kept: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    """Refuses another number of training images: the position in an epoch would be wrong.

    Args:
      path: of the checkpoint.
      kept: the description of the data that it was trained on, see `Dataset.describe`.
      dataset: the description of those that are here.
    """
    before, here = kept.get("train_size"), dataset["train_size"]
    if before not in (None, here):
        raise UserError(
            f"checkpoint {path} was trained on {before} images, and the data now has {here}; "
            "restore the data, or start in a new workdir with config.init_from"
        )


def check_classes(path: AnyPath, kept: Mapping[str, Any], dataset: Mapping[str, Any]) -> None:
    """Refuses a network that was, or may have been, trained on other classes, or in another order.

    Args:
      path: of the stage's checkpoints; `kept` and `dataset` as of `check_size`.
    """
    before, here = kept.get("class_names") or [], dataset["class_names"]
    doubt = dataset.get("order_doubt")
    if not before and doubt:
        raise UserError(
            f"the network in {path} has classes without names, and the order of those of the data is not "
            f"certain: {doubt}; set config.data.class_order to bytes or natural, in {CONFIG} where there is one"
        )
    before = list(map(as_text, before))
    if before and here and before != here:
        pairs = enumerate(zip(before, here, strict=False))
        differing = [f"class {i} was {old!r} and is now {new!r}" for i, (old, new) in pairs if old != new]
        first = differing[0] if differing else f"{len(before)} of them, and there are now {len(here)}"
        if sorted(before) == sorted(here):
            raise UserError(
                f"the network in {path} was trained on these classes in another order: {first}; set "
                "config.data.class_order to bytes or natural"
            )
        raise UserError(
            f"the network in {path} was trained on other classes: {first}; restore them, or name "
            "those data (config.data; --data)"
        )


def check_shapes(path: AnyPath, saved: Any, variables: Any) -> None:
    """Refuses a network whose arrays have other names or shapes than `variables`."""
    here, wanted = (
        {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()} for tree in (saved, variables)
    )
    for name in (*wanted, *here):
        if here.get(name) != wanted.get(name):
            there, mine = (shapes.get(name, "missing") for shapes in (here, wanted))
            raise UserError(
                f"the network in {path} does not fit: {name} is {there} there and {mine} in this config; "
                "compare config.model and config.data of both runs"
            )
