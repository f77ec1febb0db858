"""The fields of a config: each is declared here, once, with its default, its meaning and the values that can work.

`ftwt train --help` prints this table, and docs/commands.md shows it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.models import options_of

# How messages call the types of fields.
KINDS = {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "text", "tuple": "a tuple"}
# Seeds are 32-bit integers, and stages add to them.
LARGEST_SEED = 2**31 - 1
# What numbers may be, in the words of messages.
RANGES: dict[str, Callable[[float], bool]] = {
    ", at least 0": lambda value: value >= 0,
    ", at least 1": lambda value: value >= 1,
    " above 0": lambda value: value > 0,
    " in (0, 1]": lambda value: 0 < value <= 1,
    " in [0, 1)": lambda value: 0 <= value < 1,
    " between 0 and 1": lambda value: 0 < value < 1,
    f" between 0 and {LARGEST_SEED}": lambda value: 0 <= value <= LARGEST_SEED,
}
# Sections of which a config need not have every field: what is missing is left to the data set, or to the network. They
# may have others, which loaders and networks of your own take; both refuse what they do not know.
OPEN_SECTIONS = ("data", "model")


class Field(NamedTuple):
    """A field of a config.

    Attributes:
      default: its value in `default_config`; a type where it is unset there.
      meaning: on one line.
      range: what a number may be, a key of `RANGES`; empty: whatever its user takes.
    """

    default: Any
    meaning: str
    range: str = ""

    @property
    def type(self) -> type:
        """The type of its values."""
        return self.default if isinstance(self.default, type) else type(self.default)

    @property
    def wanted(self) -> str:
        """What it takes, in words."""
        return KINDS[self.type.__name__] + self.range


def _stage(section: str, lr: float, of_what: str) -> dict[str, Field]:
    """How a stage is trained: the CIFAR recipe of the authors' code, for baseline and gates alike."""
    fields = {
        "epochs": Field(200, "length of the stage in passes over the training images", ", at least 0"),
        "lr": Field(lr, f"learning rate{of_what}", " above 0"),
        "schedule": Field("step", "of the rate; step: times lr_factor at the epochs in lr_boundaries; cosine: to 0"),
        "lr_boundaries": Field((81, 122, 151), "epochs after which schedule=step lowers the rate"),
        "lr_factor": Field(0.1, "what the rate is multiplied by there", ", at least 0"),
        "momentum": Field(0.9, "of SGD", " in [0, 1)"),
        "weight_decay": Field(5e-4, "of kernels, not of gate heads", ", at least 0"),
    }
    return {f"{section}.{name}": field for name, field in fields.items()}


FIELDS: dict[str, Field] = {
    "seed": Field(1, "of parameters, order of images and augmentation", f" between 0 and {LARGEST_SEED}"),
    "init_from": Field("", "workdir whose baseline is used instead of training one"),
    "fine_tune": Field(False, "train that baseline, or one that was converted, for baseline.epochs more"),
    "batch_size": Field(128, "images in a training batch, over all devices and processes", ", at least 1"),
    "eval_batch_size": Field(
        256, "images in a batch of an evaluation, and of a calibration, which depends on it a little", ", at least 1"
    ),
    "accumulate": Field(1, "parts of a batch, run one after the other where the whole does not fit", ", at least 1"),
    "shard_optimizer": Field(False, "divide the optimizer's state over the devices"),
    "steps_per_call": Field(
        int, "most steps of one call, with images on the devices; unset: what takes half a second", ", at least 1"
    ),
    "log_every": Field(50, "steps between two reports", ", at least 1"),
    "checkpoint_every": Field(1000, "steps between two evaluations with a checkpoint", ", at least 1"),
    "data.name": Field("", "digits, fashion_mnist, tfds:NAME or folder:PATH"),
    "data.image_size": Field(int, "side of the network's input in pixels"),
    "data.augment": Field(str, "crop (small ones, held in memory), resized_crop (large ones, read as needed) or none"),
    "data.flip": Field(bool, "mirror training images at random"),
    "data.train_split": Field(str, "split expression of TFDS, or a folder's part, to train on"),
    "data.test_split": Field(str, "the same, to hold out"),
    "data.data_dir": Field(str, "where TFDS, or the package of Fashion-MNIST, keeps its files"),
    "data.test_fraction": Field(float, "share held out of a folder that is one tree of classes"),
    "data.class_order": Field(str, "of a folder: bytes (0, 1, 10, 2; torchvision) or natural (0, 1, 2, 10; timm)"),
    "data.max_pixels": Field(int, "most pixels of an image file that are decoded at once; larger ones are skipped"),
    "data.on_device": Field(bool, "keep training images on the devices; unset: if they are in memory and fit"),
    "model.name": Field("", "the network, which --config=FILE:NAME chooses"),
    "model.plan": Field(tuple, "of vgg_bn: filters of each unit, and 'M' for a pool, such as (32,'M',64)"),
    "model.width": Field(1.0, "multiple of the usual number of filters", " above 0"),
    "model.stem": Field(str, "cifar (small images) or imagenet (large ones), of networks that have both"),
    "model.dtype": Field("float32", "of the computation: float32 or bfloat16"),
    **_stage("baseline", 0.1, ""),
    "gates.r": Field(GateConfig.r, "mass threshold of the targets; smaller keeps fewer filters", " in (0, 1]"),
    "gates.budget": Field(float, "wanted MACs reduction, for which r is solved", " between 0 and 1"),
    "gates.latency": Field(
        float, "wanted share of the dense network's time, for which the budget is solved", " between 0 and 1"
    ),
    "gates.latency_ms": Field(float, "the same as a time in milliseconds", " above 0"),
    "gates.budgets": Field(tuple, "lowest and highest MACs reduction that one network is trained for, (0.3,0.8)"),
    "gates.mode": Field(GateConfig.mode, "decoupled: the gate loss is kept from the backbone; joint: it moves it"),
    "gates.pool": Field(GateConfig.pool, "how a head sums up a map: max (the paper) or mean (the authors' code)"),
    "gates.norm": Field(GateConfig.norm, "of the pooled channels: layer, softmax (the paper) or none"),
    "gates.depthwise": Field(
        GateConfig.depthwise, "a depthwise filter's gate reads its own channel, or the full input (the paper)"
    ),
    "gates.min_filters": Field(
        GateConfig.min_filters, "fewest filters that a target keeps; 0 is the published rule", ", at least 0"
    ),
    "gates.after_block": Field(GateConfig.after_block, "in ResNet blocks, mask after the addition"),
    **_stage("gates", 0.01, " of the backbone"),
    "gates.head_lr": Field(0.1, "learning rate of the heads", ", at least 0"),
    "gates.loss_weight": Field(1.0, "weight lambda of the gate loss", ", at least 0"),
    "gates.loss_reduction": Field("mean", "of the gate loss over units: mean, or sum (the paper)"),
    "gates.cooldown": Field(0.5, "share of the stage after which the heads are frozen", " in (0, 1]"),
    "gates.calibrate": Field(True, "bring the work to what was predicted, or to the budget"),
    "gates.static": Field(False, "replace the gates by fixed masks of the same work when they freeze"),
    "subnets.count": Field(0, "dense subnets to cut the trained network into; 0: none", ", at least 0"),
    "subnets.epochs": Field(float, "length of their training, which follows gates.*; unset: gates.epochs", " above 0"),
    "subnets.multiple": Field(8, "each layer of a subnet keeps a multiple of this many filters", ", at least 1"),
    "subnets.engine": Field("onnxruntime", "what gates.latency is measured in: onnxruntime, openvino, torch or xla"),
    "subnets.batch_size": Field(1, "images at once when gates.latency is measured", ", at least 1"),
}


def default_config(arch: str, stem: str) -> ConfigDict:
    """A config with every field; `data.name` and `data.image_size` are left for the caller to set.

    Args:
      arch: the network by its name in `ftwt_jax.models`.
      stem: `cifar` for small images, `imagenet` for large ones; for the networks that have both.
    """
    values = {
        name: placeholder(field.default) if isinstance(field.default, type) else field.default
        for name, field in FIELDS.items()
    }
    config = ConfigDict(unflatten_dict(values, sep="."))
    config.model.name = arch
    if "stem" in options_of(arch):
        config.model.stem = stem
    config.lock()  # A field that is misspelt in a config file is an error there, not a new field.
    return config


def missing_fields(config: ConfigDict) -> list[str]:
    """The fields that a config lacks, such as "gates.r"; of a section that it lacks as a whole, only its name."""
    there, missing = _names(config), set[str]()
    for name in FIELDS:
        section, _, key = name.rpartition(".")
        if section and section not in config:
            missing.add(section)
        elif name not in there and (section not in OPEN_SECTIONS or key == "name"):
            missing.add(name)
    return sorted(missing)


def unknown_fields(config: ConfigDict) -> list[str]:
    """The fields of a config that do not exist, such as "gates.cooldwn"."""
    return [name for name in _names(config) if name not in FIELDS and name.partition(".")[0] not in OPEN_SECTIONS]


def check_ranges(config: ConfigDict) -> None:
    """Raises `UserError` for a number outside of what its field takes; unset ones are left alone."""
    found = _names(config)
    for name, field in FIELDS.items():
        value = found.get(name)
        if not field.range or value is None:
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not RANGES[field.range](value):
            raise UserError(f"config.{name} takes {field.wanted}; got {value!r}")


def describe_fields(config: ConfigDict | None = None) -> str:
    """All fields for `--help`, with the values of a config, or the defaults."""
    found = {} if config is None else _names(config)
    lines = []
    for name, field in FIELDS.items():
        value = found.get(name) if config is not None else None if isinstance(field.default, type) else field.default
        shown = "…" if value is None else str(value).replace(" ", "")
        lines.append(f"  --config.{name}={shown}\n      {field.meaning} ({field.wanted})")
    return "\n".join(lines)


def _names(config: ConfigDict) -> dict[str, Any]:
    """A config's values by name, such as "gates.r"; the sections of an empty one do not appear."""
    return flatten_dict(config.to_dict(), sep=".")
