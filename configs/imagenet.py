"""ImageNet (ILSVRC 2012): 1,281,167 images to train on, 50,000 held out, at 224x224 pixels.

python -m ftwt_jax prepare tfds:imagenet2012     # once; TFDS says which two archives you have to download yourself
python -m ftwt_jax train --config=configs/imagenet.py:resnet34 --workdir=workdirs/imagenet_resnet34

Baseline: the usual recipe of 90 epochs. Gates: 60 epochs from it, or from another run's baseline with
--config.init_from=DIR. The authors published no code for ImageNet, so the recipe of the gates is ours. They published
these top-1 accuracies: the dense network's, then the gated network's with its MACs reduction, all decoupled.

    resnet34      73.30   r = .97: 73.25, 25.86 %   r = .95: 72.79, 37.77 %
                          r = .93: 72.17, 47.42 %   r = .92: 71.71, 52.24 %
    resnet18      69.76   r = .91: 67.49, 51.56 %
    mobilenet_v1  69.57   r = 1: 69.66, 41.07 %

This config has not been run here; it is meant for several GPUs or a TPU slice. The learning rate is for a batch of
256 and has to grow with the batch. A folder of images in train/ and val/ works too: --config.data.name=folder:PATH
--config.data.test_split=val
"""

from ml_collections import ConfigDict

from ftwt_jax.config import default_config

PUBLISHED_R = {"resnet34": 0.93, "resnet18": 0.91, "mobilenet_v1": 1.0}


def get_config(arch: str = "resnet34") -> ConfigDict:
    """The run for a network by its name in `ftwt_jax.models`."""
    config = default_config(arch, stem="imagenet")
    config.data.update(
        name="tfds:imagenet2012", image_size=224, augment="resized_crop", flip=True, test_split="validation"
    )
    config.batch_size = config.eval_batch_size = 256
    config.checkpoint_every = 5000
    for stage in (config.baseline, config.gates):
        stage.update(weight_decay=1e-4)
    config.baseline.update(epochs=90, lr=0.1, lr_boundaries=(30, 60, 80))
    config.gates.update(epochs=60, lr=0.01, lr_boundaries=(30, 45))
    config.gates.r = PUBLISHED_R.get(arch, 0.93)
    return config
