"""Scikit-learn's scanned digits: 1,347 images to train on, 450 held out, bundled.

python -m ftwt_jax train --config=configs/digits.py --workdir=workdirs/digits

A small VGG of five units on the scans of 8x8 pixels. It takes about a minute on 2 CPU cores, reaches 0.993 dense and
0.989 gated, and saves 51 % of the MACs (docs/reproduce.md).

python -m ftwt_jax train --config=configs/digits.py:resnet20 --workdir=workdirs/digits_resnet20

Any network for CIFAR (resnet20, resnet56, vgg16_bn, mobilenet_v1 ...) on the scans enlarged to 32x32. This is a
hundred times the work: train these on an accelerator, or for fewer epochs.
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
    # A backbone that goes on learning drifts away from frozen heads. On so few images that shows, so they freeze late.
    config.gates.update(r=0.85, cooldown=0.75)
    return config
