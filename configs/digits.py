"""Scikit-learn's scanned digits: 1,347 images to train on, 450 held out, no network access.

python -m ftwt_jax train --config=configs/digits.py --workdir=workdirs/digits

A small VGG of five units on the 8x8 scans, about a minute on 2 cores. The README says what it reaches.

python -m ftwt_jax train --config=configs/digits.py:resnet20 --workdir=workdirs/digits_resnet20

Any CIFAR network (resnet20, resnet56, vgg16_bn, mobilenet_v1 ...) on the scans enlarged to 32x32: the same images
cost a hundred times the work, so train these on an accelerator, or cut `epochs`.
"""

from ml_collections import ConfigDict

from ftwt_jax.config import default_config

SMALL = "vgg_bn"


def get_config(arch: str = SMALL) -> ConfigDict:
    """The run for a network by its name in `ftwt_jax.models`."""
    small = arch == SMALL
    config = default_config(arch, stem="cifar")
    config.data.name, config.data.image_size = "digits", 8 if small else 32
    if small:
        config.model.plan = (32, 32, "M", 64, 64, "M", 64)
    config.batch_size, config.eval_batch_size, config.checkpoint_every = 64, 128, 200
    for stage in (config.baseline, config.gates):
        stage.update(lr=0.1, schedule="cosine", weight_decay=2e-3)
    config.baseline.epochs, config.gates.epochs = (40, 80) if small else (20, 30)
    # Heads that freeze half-way drift from a backbone that goes on learning; on so few images it shows.
    config.gates.update(r=0.85, cooldown=0.75)
    return config
