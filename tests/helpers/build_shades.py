"""Writes small data sets with TFDS, as `python tests/helpers/build_shades.py FOLDER` from FOLDER/written.npz."""

import sys
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

FOLDER = sys.argv[-1]
SIDE, CLASSES = 32, ("dark", "medium", "light")


class FtwtShades(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    SPLITS, IMAGE, LABEL = ("train", "test"), "image", "label"
    FEATURES: ClassVar = {
        "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
        "label": tfds.features.ClassLabel(names=CLASSES),
    }

    def _info(self):
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=(self.IMAGE, self.LABEL))

    def _split_generators(self, downloads):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        written = np.load(f"{FOLDER}/written.npz")
        for key, (image, label) in enumerate(zip(written[f"{split}_images"], written[f"{split}_labels"], strict=True)):
            yield key, {self.IMAGE: image[..., : self.FEATURES[self.IMAGE].shape[-1]], self.LABEL: label}


class FtwtUndivided(FtwtShades):
    """Grey, one split, classes without names, and features with other names."""

    SPLITS, IMAGE, LABEL = ("train",), "photo", "kind"
    FEATURES: ClassVar = {
        "photo": tfds.features.Image(shape=(SIDE, SIDE, 1)),
        "kind": tfds.features.ClassLabel(num_classes=len(CLASSES)),
    }


class FtwtWords(FtwtShades):
    FEATURES: ClassVar = {"image": tfds.features.Text(), "label": tfds.features.ClassLabel(names=CLASSES)}

    def _generate_examples(self, split):
        yield 0, {"image": "a word", "label": 0}


if __name__ == "__main__":
    for builder in (FtwtShades, FtwtUndivided, FtwtWords):
        builder(data_dir=f"{FOLDER}/array_record", file_format="array_record").download_and_prepare()
    FtwtShades(data_dir=f"{FOLDER}/tfrecord").download_and_prepare()
