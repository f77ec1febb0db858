"""Fashion-MNIST: 60,000 grey images of clothes to train on, 10,000 held out, padded to 32x32 pixels.

apt-get install dataset-fashion-mnist            # once; or python -m ftwt_jax prepare tfds:fashion_mnist
python -m ftwt_jax train --config=configs/fashion_mnist.py:resnet20 --workdir=workdirs/fashion_resnet20

15 epochs of baseline and 15 of gates take about two hours on 2 CPU cores (270 images/s dense, 250 gated); this config
has not been run here to the end. results/README.md shows what three epochs of each give, and MobileNetV1.
"""

from ml_collections import ConfigDict

from ftwt_jax.config import default_config


def get_config(arch: str = "resnet20") -> ConfigDict:
    """The run for a network by its name in `ftwt_jax.models`."""
    config = default_config(arch, stem="cifar")
    config.data.update(name="fashion_mnist", image_size=32, augment="crop", flip=True)
    config.checkpoint_every = 469
    for stage in (config.baseline, config.gates):
        stage.update(epochs=15, lr=0.1, schedule="cosine")
    config.gates.r = 0.85
    return config
