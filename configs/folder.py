"""A folder of your own images: PATH/train/CLASS/*.jpg with PATH/val/CLASS/*.jpg, or PATH/CLASS/*.jpg.

python -m ftwt_jax train --config=configs/folder.py:resnet18 --config.data.name=folder:PATH --workdir=workdirs/mine

Images are 224x224 pixels: in training, random regions resized to that. If the folder is one tree of classes, a tenth
is held out (--config.data.test_fraction). For small images, which are then held in memory, add
--config.data.augment=crop --config.data.image_size=32 --config.model.stem=cifar. The duration depends on the number
of images; `python -m ftwt_jax benchmark --input` with the same flags measures how fast they can be read. Train
ResNet-18 at 224x224 on a GPU: 2 CPU cores process a few images a second.
"""

from ml_collections import ConfigDict

from ftwt_jax.config import default_config


def get_config(arch: str = "resnet18") -> ConfigDict:
    """The run for a network by its name in `ftwt_jax.models`."""
    config = default_config(arch, stem="imagenet")
    config.data.update(name="folder:", image_size=224, augment="resized_crop", flip=True)
    config.batch_size = config.eval_batch_size = 64
    config.checkpoint_every = 500
    for stage in (config.baseline, config.gates):
        stage.update(schedule="cosine", weight_decay=1e-4)
    config.baseline.update(epochs=90, lr=0.05)
    config.gates.update(epochs=60, lr=0.01)
    config.gates.r = 0.93
    return config
