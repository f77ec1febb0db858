"""Prints the tables of subnets/README.md from the figures beside it: python results/subnet_table.py"""

import json
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent / "subnets"
NETWORKS = {"vgg16_bn": "VGG-16-BN", "resnet20": "ResNet-20", "resnet56": "ResNet-56"}
DATA = {"digits": "digits, 32x32", "fashion_mnist": "Fashion-MNIST"}
# What an arm of `subnets.sh` changes.
ARMS = {
    "shared": "batch norms shared by all subnets (an earlier version)",
    "plain": "every filter counts for the same",
    "narrow": "router of at most 0.5 % of the MACs",
    "multiple": "any number of filters",
}
HEADINGS = (
    *("network, data", "K", "found by", "", "MACs reduction", "dense", "one mask per image", "**subnets**"),
    *("own subnets known", "single subnet, untrained", "router"),
)


def _row(folder: pathlib.Path) -> str:
    config, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "evaluation"))
    subnets: dict[str, Any] = found["subnets"]
    arm = folder.name.rpartition("_")[2]
    gated = f"{found['accuracy']:.4f}" if found["r"] is not None else ""
    what = f"{NETWORKS[config['model']['name']]}, {DATA[config['data']['name']]}"
    router = f"{subnets['router_accuracy']:.3f}" if len(subnets["subnets"]) > 1 else ""
    figures = [
        f"{subnets['macs_reduction']:.3f}",
        f"{found['dense_accuracy']:.4f}",
        gated,
        f"**{subnets['accuracy']:.4f}**",
    ]
    figures += [f"{subnets['own_accuracy']:.4f}", f"{subnets['one_accuracy']:.4f}" if router else "", router]
    cells = [what, str(len(subnets["subnets"])), subnets["source"], ARMS.get(arm, "")]
    return f"| {' | '.join([*cells, *figures])} |"


def tables() -> str:
    """All tables."""
    folders = sorted(FOLDER.glob("*/evaluation.json"), key=lambda path: _order(path.parent))
    lines = [f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
    lines += [_row(path.parent) for path in folders]
    return "\n".join(lines)


def _order(folder: pathlib.Path) -> tuple[Any, ...]:
    config = json.loads((folder / "config.json").read_text())
    arm = folder.name.rpartition("_")[2]
    return config["data"]["name"], config["model"]["name"], arm if arm in ARMS else "", config["subnets"]["count"]


if __name__ == "__main__":
    print(tables())
