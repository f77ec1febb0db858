"""CIFAR-10: 50,000 images of 32x32 pixels to train on, 10,000 held out.

python -m ftwt_jax prepare tfds:cifar10          # once; needs the extra [prepare] and an internet connection
python -m ftwt_jax train --config=configs/cifar10.py:resnet56 --workdir=workdirs/cifar10_resnet56

The recipe is that of the authors' code: 200 epochs of baseline, 200 of gates. They published these accuracies: the
dense network's, then the gated network's with its MACs reduction by the published count.

    vgg16_bn      93.82   r = .92: 93.73, 56 %   r = .85: 93.19, 73 %
                          joint, r = .92: 93.55, 65 %   r = .88: 92.65, 74 %
    resnet56      93.66   r = .80: 92.63, 66 %   joint, r = .88: 92.28, 54 %
    mobilenet_v1  90.89   r = 1: 91.06, 78 %     joint, r = 1: 91.21, 78 %

The defaults are the first decoupled row of each network; docs/reproduce.md has the flags for every row. This config
has not been run here to the end. On 2 CPU cores ResNet-56 trains at about 50 images/s, which is five days for the
whole run: use a GPU or a TPU.
"""

from ml_collections import ConfigDict

from ftwt_jax.config import default_config

# r of the published decoupled rows.
PUBLISHED_R = {"vgg16_bn": 0.92, "resnet56": 0.8, "mobilenet_v1": 1.0}


def get_config(arch: str = "resnet56") -> ConfigDict:
    """The run for a network by its name in `ftwt_jax.models`."""
    config = default_config(arch, stem="cifar")
    config.data.update(name="tfds:cifar10", image_size=32, augment="crop", flip=True)
    config.gates.r = PUBLISHED_R.get(arch, 0.9)
    if arch == "mobilenet_v2":
        for stage in (config.baseline, config.gates):
            stage.schedule = "cosine"
    return config
