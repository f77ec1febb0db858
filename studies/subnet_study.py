"""What subnets are made of, compared: features of the clustering, width and input of the router.

python -m studies.subnet_study --features=plain --router_share=0.005 train --config=… --workdir=DIR …
python -m studies.subnet_study look --workdir=DIR

After the flags of the study comes a command of `python -m ftwt_jax`. `look` measures, on a trained workdir and without
changing it, the accuracy of a router that reads the first unit's output in place of the image, trained beside one that
reads the image.
"""

import argparse
import json
import sys
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import optax

from ftwt_jax.__main__ import main
from ftwt_jax.budget.subnets import SubnetFinder, subnet_network
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.gating.units import GatedUnit
from ftwt_jax.subnets import network as networks
from ftwt_jax.subnets.network import Router
from ftwt_jax.subnets.ties import Ties
from ftwt_jax.training.run import Run, load_run
from ftwt_jax.training.settings import BASELINE, GATED

# Of the routers that `look` trains.
EPOCHS, BATCH = 10, 64


def patch(features: str, router_share: float | None) -> None:
    """Changes how subnets are found from here on."""
    if features == "plain":
        # Every group of filters counts for the same.
        mock.patch.object(Ties, "costs", lambda ties: np.full(ties.count, 1 / ties.count, np.float32)).start()
    if router_share is not None:
        networks.make_router.__defaults__ = (router_share,)


def router_designs(run: Run, finder: SubnetFinder) -> dict[str, float]:
    """Held-out accuracy of routers of equal width that read the image, and the dense network's first unit."""
    model = subnet_network(run)
    assert isinstance(model.router, Router)
    dense = run.trained(BASELINE)
    own = finder.labels(model.subnets, run.test_batches())[: len(run.dataset.test.labels)]

    @jax.jit
    def stem(images: Any) -> Any:
        first = []

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            called = isinstance(context.module, GatedUnit) and context.method_name == "__call__"
            if called and not first:
                first.append(out.values)
            return out

        with nn.intercept_methods(keep):
            run.models[BASELINE].apply(dense, run.normalize(images))
        return first[0]

    found = {}
    for name, prepare in (("image", jax.jit(run.normalize)), ("first unit", stem)):
        batches = [prepare(batch["image"]) for batch in eval_batches(run.dataset, run.dataset.train, BATCH)]
        train = np.concatenate(batches)[: len(run.dataset.train)]
        test = np.concatenate([prepare(batch["image"]) for batch in run.test_batches()])[: len(own)]
        found[name] = _train(model.router, train, model.subnets.assignment, test, own)
    return found


def _train(router: Router, images: Any, labels: Any, test: Any, own: Any) -> float:
    steps = EPOCHS * len(images) // BATCH
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)
    variables = jax.jit(router.init)(jax.random.key(0), images[:1])

    @jax.jit
    def step(variables: Any, state: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            given = {**variables, "params": params}
            out, changed = router.apply(given, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean(), changed

        gradients, changed = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        return {**changed, "params": optax.apply_updates(variables["params"], updates)}, state

    state, rng = optimizer.init(variables["params"]), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(images), BATCH)
        variables, state = step(variables, state, images[rows], labels[rows])
    logits = np.concatenate([router.apply(variables, test[at : at + 500]).logits for at in range(0, len(test), 500)])
    return float(np.mean(np.argmax(logits, axis=-1) == own))


def look(folder: str) -> dict[str, Any]:
    """What `look` measures, as JSON data; also written to `look.json` in the workdir."""
    run = load_run(folder)
    source = subnet_network(run).subnets.source
    finder = SubnetFinder(run, run.trained(GATED if source == "heads" else BASELINE), run.config.gates.r, source)
    found = {"router_accuracy_by_input": router_designs(run, finder)}
    (run.workdir / "look.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--features", choices=("weighted", "plain"), default="weighted")
    parser.add_argument("--router_share", type=float, help="of the dense network's MACs")
    known, rest = parser.parse_known_args()
    patch(known.features, known.router_share)
    if rest[:1] == ["look"]:
        print(json.dumps(look(rest[1].removeprefix("--workdir=")), indent=1))
    else:
        sys.exit(main(rest))
