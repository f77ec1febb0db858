"""Compares images/s of this project's input and of a PyTorch `DataLoader` with Pillow, on the same images and cores.

python -m studies.input_against_torch [--images=FOLDER] [--batch=64] [--seconds=4] [--rounds=5]     needs PyTorch

Both take turns. Both read the files, resize a random region by the same rule to 224x224 and yield batches of uint8; the
conversion to float, which a typical `DataLoader` does on the CPU as well, is left out. Without --images: 200 JPEGs of
500x375 pixels, cropped from scikit-learn's sample photographs.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from absl import app, flags
from PIL import Image
from sklearn.datasets import load_sample_images

from ftwt_jax.data import load_dataset
from ftwt_jax.data.decoding import EXTENSIONS
from ftwt_jax.data.pipeline import train_batches
from ftwt_jax.data.views import random_region
from ftwt_jax.parallel.processes import cpu_count

SIDE = 224
IMAGES = flags.DEFINE_string("images", "", "folder with train/ and val/")
BATCH = flags.DEFINE_integer("batch", 64, "images per batch")
SECONDS = flags.DEFINE_float("seconds", 4.0, "length of a turn in seconds")
ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each")


def write_photographs(folder: pathlib.Path, count: int = 200) -> None:
    """Crops images of about the dimensions and file size of ImageNet's from two photographs."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for index in range(count):
        photograph = photographs[index % 2]
        width, height = (int(side * rng.uniform(0.7, 1)) for side in photograph.size)
        left, top = (rng.integers(0, a - b + 1) for a, b in zip(photograph.size, (width, height), strict=True))
        region = photograph.crop((left, top, left + width, top + height))
        path = folder / ("val" if index % 20 < 2 else "train") / f"class{index % 2}" / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        region.resize((500, 375) if index % 3 else (375, 500), Image.Resampling.BICUBIC).save(path, quality=90)


class Pillow(torch.utils.data.Dataset):
    """A typical data set in PyTorch: open, convert, crop and resize with Pillow."""

    def __init__(self, folder: pathlib.Path):
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(self.paths[index]).convert("RGB")
        rng = np.random.default_rng(torch.initial_seed() % 2**32 + index)
        top, left, height, width = random_region(image.height, image.width, rng)
        box = (left, top, left + width, top + height)
        pixels = np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))
        return torch.from_numpy(pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels), 0


def loader(folder: pathlib.Path) -> Iterator[object]:
    """Endless batches from a `DataLoader` with a worker process per core."""
    batches = torch.utils.data.DataLoader(
        Pillow(folder), BATCH.value, shuffle=True, num_workers=cpu_count(), persistent_workers=True, drop_last=True
    )
    while True:
        yield from batches


def measure_rate(step: Callable[[], object]) -> float:
    """Images per second of one turn, measured once the batches prepared ahead are used up."""
    deadline = time.perf_counter() + SECONDS.value / 2
    while time.perf_counter() < deadline:
        step()
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < SECONDS.value:
        step()
        count += BATCH.value
    return count / passed


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(IMAGES.value or scratch)
        if not IMAGES.value:
            write_photographs(folder)
        ours = train_batches(load_dataset(f"folder:{folder}"), BATCH.value, seed=0)
        theirs = loader(folder / "train")
        rates: dict[str, list[float]] = {"ours": [], "DataLoader": []}
        for _ in range(ROUNDS.value):
            rates["ours"].append(measure_rate(lambda: next(ours)))
            rates["DataLoader"].append(measure_rate(lambda: next(theirs)))
        medians = {name: statistics.median(turns) for name, turns in rates.items()}
        for name, turns in rates.items():
            print(f"{name:10}  {medians[name]:6.0f} images/s   ({', '.join(f'{r:.0f}' for r in turns)})")
        print(f"ratio       {medians['ours'] / medians['DataLoader']:.2f} on {cpu_count()} cores")
    sys.exit(0)


if __name__ == "__main__":
    app.run(main)
