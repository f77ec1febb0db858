"""The fields of a config and their defaults; the files in `configs/` say what differs for a data set."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ftwt_jax.models import options_of


def _stage() -> dict:
    """How a stage is trained: the CIFAR recipe of the authors' code, baseline and gates alike."""
    return {
        "epochs": 200,
        "lr": 0.1,
        # "step": times lr_factor at these epochs; "cosine": to 0 at the end.
        "schedule": "step",
        "lr_boundaries": (81, 122, 151),
        "lr_factor": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }


def default_config(arch: str, stem: str) -> ConfigDict:
    """A config with every field; `data.name` and `data.image_size` are still to be filled in.

    Args:
      arch: the network by its name in `ftwt_jax.models`.
      stem: `cifar` for small images, `imagenet` for large ones; for the networks that have both.
    """
    return ConfigDict(
        {
            "seed": 1,
            # A workdir whose baseline is taken instead of training one.
            "init_from": "",
            "data": {
                # digits, fashion_mnist, tfds:NAME or folder:PATH.
                "name": "",
                # Side of the images that the network is given. This and the rest: None leaves it to the data set.
                "image_size": placeholder(int),
                # crop (small images, held in memory), resized_crop (large ones, read as needed) or none.
                "augment": placeholder(str),
                # Whether training images are mirrored at random.
                "flip": placeholder(bool),
                # Split expressions of TFDS, or the names of a folder's two parts.
                "train_split": placeholder(str),
                "test_split": placeholder(str),
                # Where TFDS, or the package of Fashion-MNIST, keeps its files.
                "data_dir": placeholder(str),
                # Share held out of a folder that is one tree of classes.
                "test_fraction": placeholder(float),
            },
            "model": {
                "name": arch,
                "plan": placeholder(tuple),
                "width": 1.0,
                "stem": stem if "stem" in options_of(arch) else placeholder(str),
                "dtype": "float32",
            },
            # Over all devices and processes.
            "batch_size": 128,
            "eval_batch_size": 256,
            # Parts of a batch that are dealt with one after the other, where all of it does not fit.
            "accumulate": 1,
            # Divides the optimizer's state over the devices.
            "shard_optimizer": False,
            # Steps between two reports, and between two evaluations with a checkpoint.
            "log_every": 50,
            "checkpoint_every": 1000,
            "baseline": _stage(),
            "gates": {
                # Mass threshold; or a wanted MACs reduction in `budget`, for which r is solved.
                "r": 0.9,
                "budget": placeholder(float),
                # Least and most MACs reduction, such as (0.3, 0.8): once the heads are frozen, each batch is trained at
                # a budget in between, and one network serves them all.
                "budgets": placeholder(tuple),
                "mode": "decoupled",
                # Of the heads: the best of results/README.md. The paper has max, softmax, full; its code mean pools.
                "pool": "max",
                "softmax": True,
                "norm": "layer",
                "depthwise": "own",
                "after_block": False,
                "min_filters": 1,
                **_stage(),
                "lr": 0.01,
                "head_lr": 0.1,
                # Weight lambda of the gate loss, its mean or sum over units, and the share of training it counts for.
                "loss_weight": 1.0,
                "loss_reduction": "mean",
                "cooldown": 0.5,
                # Brings the work to what was predicted (or to the budget) by one offset to all gate logits, when the
                # heads freeze and at the end.
                "calibrate": True,
                # Replaces the gates, when they freeze, by fixed masks of the same work: static pruning.
                "static": False,
            },
        }
    )
