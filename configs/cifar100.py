"""CIFAR-100: 50,000 images of 32x32 pixels in 100 classes to train on, 10,000 held out.

python -m ftwt_jax prepare tfds:cifar100         # once; needs the extra [prepare] and an internet connection
python -m ftwt_jax train --config=configs/cifar100.py:resnet56 --workdir=workdirs/cifar100_resnet56

Recipe and duration are those of configs/cifar10.py. The paper has no table for this data set, and this config has not
been run here. To choose r by the saving that you want, use --config.gates.budget.
"""

from ml_collections import ConfigDict

from ftwt_jax.config import default_config


def get_config(arch: str = "resnet56") -> ConfigDict:
    """The run for a network by its name in `ftwt_jax.models`."""
    config = default_config(arch, stem="cifar")
    config.data.update(name="tfds:cifar100", image_size=32, augment="crop", flip=True)
    if arch == "mobilenet_v2":
        for stage in (config.baseline, config.gates):
            stage.schedule = "cosine"
    return config
