"""Prints the tables of README.md in this folder from the figures beside it: python results/table.py"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import ftwt_jax as ftwt

HERE = pathlib.Path(__file__).resolve().parent
NETWORKS = {"resnet20": "ResNet-20", "mobilenet_v1": "MobileNetV1, width .25"}
# Each kind of run, and how the table calls it.
GATED = {
    "half": "gated, budget .5",
    "half_early": "gated, budget .5, early",
    "half_joint": "gated, budget .5, joint",
    "seventy": "gated, budget .7",
    "any": "gated, one network for all budgets",
}
STATIC = {"half_static": "fixed masks, trained as long"}
DENSE = {
    "dense": "dense",
    "dense_long": "dense, trained as long as all below",
    "narrow_half": "narrower, dense",
    "narrow_seventy": "narrower, dense",
}
# Each design of gate heads that `heads.sh` trains.
HEADS = {
    "paper": "`norm=softmax depthwise=full` (the paper's)",
    "full": "`depthwise=full`",
    "full_mean": "`depthwise=full pool=mean`",
    "own": "the default of the configs: `norm=layer depthwise=own pool=max`",
    "own_mean": "`pool=mean`",
    "both": "`depthwise=full`, both pools side by side",
    "hidden": "`depthwise=full`, a hidden layer of 32",
    "rare": "the default, rare filters weighted",
    "joint": "the default, joint",
}
HEAD = "| network | seed | | epochs | MACs reduction, exact | published | accuracy | to dense | fixed masks |"
GATES = "| network | seed | gates | r | budget | predicted | exact | gate accuracy | static gate accuracy | dynamic |"
STUDY = "| heads | accuracy | fixed masks | gate accuracy | static gate accuracy | dynamic | exact |"


def _read(run: pathlib.Path, name: str) -> dict[str, Any] | None:
    path = run / name
    return json.loads(path.read_text()) if path.exists() else None


def _runs() -> Iterator[tuple[str, str, int, pathlib.Path]]:
    """Network, kind and seed of each run, and its folder."""
    for arch in NETWORKS:
        folders = sorted(HERE.glob(f"{arch}_*_seed*"))
        for kind in DENSE | GATED | STATIC:
            for folder in folders:
                stem, _, seed = folder.name.rpartition("_seed")
                if stem == f"{arch}_{kind}":
                    yield arch, kind, int(seed), folder


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _heading(head: str) -> list[str]:
    """The first two lines of a table."""
    return [head, _line(["---"] * (head.count("|") - 1))]


def _macs(config: dict[str, Any]) -> float:
    """MACs of the dense network of a run."""
    size = config["data"]["image_size"]
    options = {key: value for key, value in config["model"].items() if value is not None and key != "dtype"}
    model = ftwt.create_model(num_classes=10, **options)
    image = jnp.zeros((1, size, size, 1))
    return ftwt.dense_macs(jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), image)[0]))


def _epochs(config: dict[str, Any]) -> str:
    """Of the baseline, and of the gates."""
    baseline, gates = (config[stage]["epochs"] for stage in ("baseline", "gates"))
    return f"{baseline} + {gates}" if gates else str(baseline)


def accuracy_table() -> list[str]:
    """A row for each run and reduction: accuracy, and how many points that is above the dense network's."""
    dense, work = {}, {}
    for arch, kind, seed, folder in _runs():
        found, config = _read(folder, "evaluation.json"), _read(folder, "config.json")
        if kind == "dense" and found is not None and config is not None:
            dense[arch, seed], work[arch, seed] = found["dense_accuracy"], _macs(config)
    lines = _heading(HEAD)
    for arch, kind, seed, folder in _runs():
        found, curve = _read(folder, "evaluation.json"), _read(folder, "budgets.json")
        config, whole = _read(folder, "config.json"), dense.get((arch, seed))
        if found is None or config is None or whole is None:
            continue
        rows = [found]
        if kind in DENSE:
            rows = [{"accuracy": found["dense_accuracy"], "macs_reduction": 1 - _macs(config) / work[arch, seed]}]
        elif kind == "any" and curve is not None:
            rows = curve["rows"]
        for row in rows:
            published, fixed = row.get("macs_reduction_published"), row.get("static_accuracy")
            lines.append(
                _line(
                    [
                        NETWORKS[arch],
                        str(seed),
                        (DENSE | GATED | STATIC)[kind],
                        _epochs(config),
                        f"{row['macs_reduction']:.3f}",
                        "" if published is None else f"{published:.3f}",
                        f"{row['accuracy']:.4f}",
                        "" if kind == "dense" else f"{100 * (row['accuracy'] - whole):+.2f}",
                        "" if fixed is None or kind in STATIC else f"{fixed:.4f}",
                    ]
                )
            )
    return lines


def gate_table() -> list[str]:
    """A row for each gated run: what was asked, predicted and reached, and what its gates have learnt."""
    lines = _heading(GATES)
    for arch, kind, seed, folder in _runs():
        found, config = _read(folder, "evaluation.json"), _read(folder, "config.json")
        if found is None or config is None or found["gate_accuracy"] is None:
            continue
        lines.append(
            _line(
                [
                    NETWORKS[arch],
                    str(seed),
                    (GATED | STATIC)[kind],
                    f"{found['r']:.3f}",
                    f"{config['gates']['budget']:g}",
                    f"{found['predicted_macs_reduction']:.3f}",
                    f"{found['macs_reduction']:.3f}",
                    f"{found['gate_accuracy']:.3f}",
                    f"{found['static_gate_accuracy']:.3f}",
                    f"{found['dynamic_filters']:.2f}",
                ]
            )
        )
    return lines


def head_table() -> list[str]:
    """A row for each design of gate heads."""
    lines = _heading(STUDY)
    for name, design in HEADS.items():
        for path in sorted(HERE.glob(f"mobilenet_v1_head_{name}_seed*/evaluation.json")):
            found = json.loads(path.read_text())
            lines.append(
                _line(
                    [
                        design,
                        f"{found['accuracy']:.4f}",
                        f"{found['static_accuracy']:.4f}",
                        f"{found['gate_accuracy']:.3f}",
                        f"{found['static_gate_accuracy']:.3f}",
                        f"{found['dynamic_filters']:.2f}",
                        f"{found['macs_reduction']:.3f}",
                    ]
                )
            )
    return lines


if __name__ == "__main__":
    print("\n".join([*accuracy_table(), "", *gate_table(), "", *head_table()]))
