"""What `evaluate` says of subnets: accuracy, work and images of each, and what other numbers of them would give."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from ftwt_jax.budget.latency import Stopwatch, check_latency, wants_latency
from ftwt_jax.budget.subnets import SubnetFinder, look_at_subnets, one_subnet, subnet_network
from ftwt_jax.errors import UserError
from ftwt_jax.parallel.processes import is_first
from ftwt_jax.training.evaluator import Evaluation
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS

# Classes that a row names.
_NAMED = 4


def evaluate_subnets(run: Run, r: float, best: bool = False) -> dict[str, Any] | None:
    """The figures of a run's subnets on the held-out split; None without subnets.

    Returns:
      accuracy, macs_reduction, macs_reduction_published: of the routed network, the router's MACs included.
      router_accuracy, own_accuracy: see `look_at_subnets`; `router_loss` is what the router's mistakes cost.
      one_accuracy, one_macs_reduction: of a single subnet for all images, not trained further.
      subnets: for each, images, accuracy (null without images), macs_reduction without the router, and the number of
        images of each class.
      shared: of the filters that any subnet keeps, the share that all of them keep.
      units: for each layer, `filters` in the dense network, `kept` by each subnet, and by `all` and by `any` of them.
    """
    if not run.has(SUBNETS):
        return None
    variables, subnets = run.trained(SUBNETS, best), subnet_network(run).subnets
    found = run.evaluator(SUBNETS).run(variables, run.test_batches(), r)
    assert found.routes is not None
    # The network in which they were found.
    source = run.trained(GATED if subnets.source == "heads" else BASELINE)
    finder = SubnetFinder(run, source, r, subnets.source)
    one = one_subnet(finder, variables, found.macs_reduction)
    looked = look_at_subnets(finder, variables)
    kept = list(subnets.masks.values())
    rows = [
        {
            "images": images,
            "accuracy": accuracy,
            "macs_reduction": float(1 - macs / subnets.dense_macs),
            "classes": None if found.routes.classes is None else found.routes.classes[index],
        }
        for index, (images, accuracy, macs) in enumerate(
            zip(found.routes.images, found.routes.accuracy, subnets.macs, strict=True)
        )
    ]
    return {
        "accuracy": found.accuracy,
        "macs_reduction": found.macs_reduction,
        "macs_reduction_published": found.macs_reduction_published,
        **looked,
        "router_loss": looked["own_accuracy"] - found.accuracy,
        "one_accuracy": one["accuracy"],
        "one_macs_reduction": one["macs_reduction"],
        "source": subnets.source,
        "shared": float(sum(mask.all(axis=0).sum() for mask in kept) / sum(mask.any(axis=0).sum() for mask in kept)),
        "units": {
            name: {
                "filters": mask.shape[1],
                "kept": [int(row.sum()) for row in mask],
                "all": int(mask.all(axis=0).sum()),
                "any": int(mask.any(axis=0).sum()),
            }
            for name, mask in _in_order(found, subnets.masks)
        },
        "subnets": rows,
        "latency": _latency(run, variables, best),
        "class_accuracy": found.class_accuracy,
        "confusion": found.confusion,
    }


def _latency(run: Run, variables: Any, best: bool) -> dict[str, Any] | None:
    """What a run's subnets take of the time that they were asked to take; None if that is not what was asked for.

    Without the engine on this machine, `missing` says so in place of the times. One process times for all.
    """
    if not wants_latency(run.config):
        return None
    gates, dense = run.config.gates, run.trained(BASELINE, best)  # Read by all processes together.
    if not is_first():
        return None
    wanted = {"wanted": gates.latency, "wanted_ms": gates.latency_ms}
    try:
        check_latency(run.config)
    except UserError as error:
        return {**wanted, "missing": str(error)}
    found = Stopwatch(run, dense).measure(subnet_network(run), variables)
    return {**found.entry(), **wanted}


def _in_order(found: Evaluation, masks: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The masks of layers, in the order in which the network runs them."""
    names = dict.fromkeys(work.layer.name for work in found.layers)
    return [(name, masks[name]) for name in names if name in masks]


def subnet_table(result: dict[str, Any], class_names: list[str]) -> Table:
    """A row per subnet, and one for all."""
    table = Table(title="subnets")
    table.add_column("subnet")
    for heading in ("images", "accuracy", "MACs reduction"):
        table.add_column(heading, justify="right")
    table.add_column("most of its images")
    for index, row in enumerate(result["subnets"]):
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        named = _most(row["classes"], class_names)
        table.add_row(str(index), f"{row['images']:,}", accuracy, f"{row['macs_reduction']:.3f}", escape(named))
    table.add_section()
    images = sum(row["images"] for row in result["subnets"])
    table.add_row("all, routed", f"{images:,}", f"{result['accuracy']:.4f}", f"{result['macs_reduction']:.3f}", "")
    table.add_row("all, each in its own", "", f"{result['own_accuracy']:.4f}", "", "")
    one = f"{result['one_accuracy']:.4f}", f"{result['one_macs_reduction']:.3f}"
    table.add_row("a single subnet, not trained", "", *one, "")
    table.add_row("router", "", f"{result['router_accuracy']:.4f}", "", "")
    latency = result["latency"]
    if latency is not None and "missing" in latency:
        table.caption = f"time not measured: {escape(latency['missing'])}"
    elif latency is not None:
        text = f"{latency['ms']:.3g} of {latency['dense_ms']:.3g} ms ({latency['share']:.1%})"
        table.caption = f"{text} of the dense network in {latency['engine']}, batch {latency['batch_size']}"
    return table


def _most(classes: list[int] | None, names: list[str]) -> str:
    """The classes of most images: "3, 8, 9 (84 %)"."""
    if not classes or not sum(classes):
        return ""
    order = np.argsort(-np.array(classes), kind="stable")[:_NAMED]
    chosen = [int(label) for label in order if classes[label]]
    share = sum(classes[label] for label in chosen) / sum(classes)
    return f"{', '.join(names[label] if names else str(label) for label in chosen)} ({share:.0%})"
