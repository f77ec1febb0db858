"""Prints the tables of results/README.md from the JSON files beside it: python results/table.py"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import ftwt_jax as ftwt

HERE = pathlib.Path(__file__).resolve().parent
NETWORKS = {"resnet20": "ResNet-20", "mobilenet_v1": "MobileNetV1, width .25"}
# Each kind of run, and its name in the table.
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


def _read_json(run: pathlib.Path, name: str) -> dict[str, Any] | None:
    path = run / name
    return json.loads(path.read_text()) if path.exists() else None


def _find_runs() -> Iterator[tuple[str, str, int, pathlib.Path]]:
    """Network, kind, seed and folder of each run."""
    for arch in NETWORKS:
        folders = sorted(HERE.glob(f"{arch}_*_seed*"))
        for kind in DENSE | GATED | STATIC:
            for folder in folders:
                stem, _, seed = folder.name.rpartition("_seed")
                if stem == f"{arch}_{kind}":
                    yield arch, kind, int(seed), folder


def _format_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _start_table(head: str) -> list[str]:
    """The first two lines of a table."""
    return [head, _format_row(["---"] * (head.count("|") - 1))]


def _count_macs(config: dict[str, Any]) -> float:
    """Exact MACs of the dense network of a run."""
    size = config["data"]["image_size"]
    options = {key: value for key, value in config["model"].items() if value is not None and key != "dtype"}
    model = ftwt.create_model(num_classes=10, **options)
    image = jnp.zeros((1, size, size, 1))
    return ftwt.dense_macs(jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), image)[0]))


def _format_epochs(config: dict[str, Any]) -> str:
    """Epochs of the baseline and of the gates, such as "3 + 3"."""
    baseline, gates = (config[stage]["epochs"] for stage in ("baseline", "gates"))
    return f"{baseline} + {gates}" if gates else str(baseline)


def tabulate_accuracy() -> list[str]:
    """A row for each run and reduction: accuracy, and the points gained over the dense network."""
    dense, work = {}, {}
    for arch, kind, seed, folder in _find_runs():
        found, config = _read_json(folder, "evaluation.json"), _read_json(folder, "config.json")
        if kind == "dense" and found is not None and config is not None:
            dense[arch, seed], work[arch, seed] = found["dense_accuracy"], _count_macs(config)
    lines = _start_table(HEAD)
    for arch, kind, seed, folder in _find_runs():
        found, curve = _read_json(folder, "evaluation.json"), _read_json(folder, "budgets.json")
        config, baseline = _read_json(folder, "config.json"), dense.get((arch, seed))
        if found is None or config is None or baseline is None:
            continue
        rows = [found]
        if kind in DENSE:
            rows = [{"accuracy": found["dense_accuracy"], "macs_reduction": 1 - _count_macs(config) / work[arch, seed]}]
        elif kind == "any" and curve is not None:
            rows = curve["rows"]
        for row in rows:
            published, fixed = row.get("macs_reduction_published"), row.get("static_accuracy")
            lines.append(
                _format_row(
                    [
                        NETWORKS[arch],
                        str(seed),
                        (DENSE | GATED | STATIC)[kind],
                        _format_epochs(config),
                        f"{row['macs_reduction']:.3f}",
                        "" if published is None else f"{published:.3f}",
                        f"{row['accuracy']:.4f}",
                        "" if kind == "dense" else f"{100 * (row['accuracy'] - baseline):+.2f}",
                        "" if fixed is None or kind in STATIC else f"{fixed:.4f}",
                    ]
                )
            )
    return lines


def tabulate_gates() -> list[str]:
    """A row for each gated run: budget, predicted and measured reduction, and what its gates have learned."""
    lines = _start_table(GATES)
    for arch, kind, seed, folder in _find_runs():
        found, config = _read_json(folder, "evaluation.json"), _read_json(folder, "config.json")
        if found is None or config is None or found["gate_accuracy"] is None:
            continue
        lines.append(
            _format_row(
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


def tabulate_heads() -> list[str]:
    """A row for each design of gate heads."""
    lines = _start_table(STUDY)
    for name, design in HEADS.items():
        for path in sorted(HERE.glob(f"mobilenet_v1_head_{name}_seed*/evaluation.json")):
            found = json.loads(path.read_text())
            lines.append(
                _format_row(
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
    print("\n".join([*tabulate_accuracy(), "", *tabulate_gates(), "", *tabulate_heads()]))
