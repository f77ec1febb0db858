"""Four workdirs to report, made of one: as it is, with more beside it, without gates, and without its images."""

import json
import pathlib
import shutil

CURVE = [
    {"budget": budget, "offset": 0.1, "accuracy": accuracy, "macs_reduction": budget}
    for budget, accuracy in ((0.6, 0.4321), (0.3, 0.8765))
]
CORRUPTED = [
    {
        "corruption": name,
        "severity": severity,
        "dense_accuracy": 0.9 - severity / 10,
        "accuracy": 0.87654 - severity / 10,
        "density": 0.5,
        "macs_reduction": 0.45,
    }
    for name in ("fog", "gaussian_noise")
    for severity in (1, 3, 5)
]
TIMES = {"arch": "vgg_bn", "batch": 1, "device": "<cpu>", "dense_ms": 8.642, "masked_ms": 9.5, "compact_ms": 4.321}
# Where it was trained, in order.
MOVED = [{"devices": "32 x TPU v5 lite (tpu)"}, {"devices": "8 x <H100> (gpu)", "jax": "0.10.2"}]
# A name that both the page and the plots must escape.
STRANGE = '_$<b>&"x$'


def change_json(path: pathlib.Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def copies(run: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """The workdirs: `plain`; `STRANGE`, with tables beside it; `dense`; and one whose images are gone."""
    found = [folder / name for name in ("plain", STRANGE, "dense", "gone")]
    for path in found:
        shutil.copytree(run, path)
    _, strange, dense, gone = found
    (strange / "budgets.json").write_text(json.dumps({"rows": CURVE}))
    (strange / "corruptions.json").write_text(json.dumps({"source": "applied", "samples": 450, "rows": CORRUPTED}))
    (strange / "benchmark.json").write_text(json.dumps(TIMES | {"macs_reduction": 0.6}))
    (strange / "environment.json").write_text(json.dumps(MOVED))
    shutil.rmtree(dense / "checkpoints" / "gated")
    none = dict.fromkeys(("gate_accuracy", "static_gate_accuracy", "dynamic_filters", "r"))
    change_json(dense / "evaluation.json", macs_reduction=0.0, density=[], units=[], **none)
    config = json.loads((gone / "config.json").read_text())
    config["data"]["name"] = f"folder:{folder / 'images'}"
    (gone / "config.json").write_text(json.dumps(config))
    (gone / "metrics.jsonl").unlink()
    return found
