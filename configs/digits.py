"""Scikit-learn's scanned digits: trains in minutes on a laptop, needs no network.

python -m ftwt_jax train --config=configs/digits.py --workdir=workdirs/digits
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

SMALL = "vgg_bn"


def get_config(arch: str = SMALL) -> ConfigDict:
    """The run on 8x8 scans with a small VGG, or with any CIFAR network on scans enlarged to 32x32."""
    small = arch == SMALL
    return ConfigDict(
        {
            "seed": 0,
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
            "eval_batch_size": 150,
            "log_every": 50,
            "checkpoint_every": 200,
            "baseline": {
                "epochs": 40,
                "lr": 0.1,
                "schedule": "cosine",
                "lr_boundaries": (20, 30),
                "lr_factor": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
            },
            "gates": {
                "r": 0.75,
                "budget": placeholder(float),
                "mode": "decoupled",
                "pool": "max",
                "softmax": True,
                "after_block": False,
                "epochs": 40,
                "lr": 0.01,
                "schedule": "cosine",
                "lr_boundaries": (20, 30),
                "lr_factor": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "head_lr": 0.1,
                "loss_weight": 1.0,
                "loss_reduction": "mean",
                "cooldown": 0.5,
            },
        }
    )
