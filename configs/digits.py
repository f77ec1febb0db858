"""Scikit-learn's scanned digits: 1,347 pictures to train on, 450 held out, no network access.

python -m ftwt_jax train --config=configs/digits.py --workdir=workdirs/digits

A small VGG of five units on the 8x8 scans, about a minute on 2 cores. The README says what it reaches.

python -m ftwt_jax train --config=configs/digits.py:resnet20 --workdir=workdirs/digits_resnet20

Any CIFAR network (resnet20, resnet56, vgg16_bn, mobilenet_v1 ...) on the scans enlarged to 32x32: the same pictures
cost a hundred times the work, so train these on an accelerator, or cut `epochs`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

SMALL = "vgg_bn"


def get_config(arch: str = SMALL) -> ConfigDict:
    """The run for a network by its name in `ftwt_jax.models`."""
    small = arch == SMALL
    return ConfigDict(
        {
            "seed": 1,
            # A workdir whose baseline is taken instead of training one.
            "init_from": "",
            "data": {"name": "digits", "image_size": 8 if small else 32},
            "model": {
                "name": arch,
                "plan": (32, 32, "M", 64, 64, "M", 64) if small else placeholder(tuple),
                "width": 1.0,
                "stem": placeholder(str),
                "dtype": "float32",
            },
            "batch_size": 64,
            "eval_batch_size": 128,
            # Steps between two reports, and between two evaluations with a checkpoint.
            "log_every": 50,
            "checkpoint_every": 200,
            "baseline": {
                "epochs": 40 if small else 20,
                "lr": 0.1,
                "schedule": "cosine",
                # For schedule "step": times lr_factor at these epochs.
                "lr_boundaries": (20, 30),
                "lr_factor": 0.1,
                "momentum": 0.9,
                "weight_decay": 2e-3,
            },
            "gates": {
                # Mass threshold; or a wanted MACs reduction in `budget`, for which r is solved.
                "r": 0.85,
                "budget": placeholder(float),
                "mode": "decoupled",
                "pool": "max",
                "softmax": True,
                "after_block": False,
                "min_filters": 1,
                "epochs": 80 if small else 30,
                "lr": 0.1,
                "schedule": "cosine",
                "lr_boundaries": (40, 60),
                "lr_factor": 0.1,
                "momentum": 0.9,
                "weight_decay": 2e-3,
                "head_lr": 0.1,
                # Weight lambda of the gate loss, its mean or sum over units, and the share of training it counts for.
                "loss_weight": 1.0,
                "loss_reduction": "mean",
                "cooldown": 0.5,
            },
        }
    )
