"""The estimate against a count by hand: the dense network run with its own targets as masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt
from ftwt_jax.budget.estimate import Estimator
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.gating.variables import init_from_dense
from ftwt_jax.parallel.sharding import data_mesh
from ftwt_jax.training.evaluator import Evaluator

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLAN = (8, "M", 12, 16)


def normalize(images):
    return images.astype(jnp.float32) / 255


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    source = ArraySource(rng.integers(0, 256, (50, 8, 8, 3), np.uint8), rng.integers(0, 4, 50).astype(np.int32))
    dataset = Dataset(source, source, 4, (8, 8, 3), (0.0,), (1.0,))
    model = ftwt.create_model("vgg_bn", 4, gates=ftwt.GateConfig(), plan=PLAN)
    dense = ftwt.create_model("vgg_bn", 4, plan=PLAN)
    variables = dense.init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))
    evaluator = Evaluator(model, normalize, data_mesh(), masks="targets")
    estimator = Estimator(evaluator, variables, list(eval_batches(dataset, dataset.test, 16)))
    return estimator, model, dense, variables, dataset, evaluator


@pytest.mark.parametrize("r", [0.3, 0.8, 1.0])
def test_prediction_is_the_work_of_the_dense_network_under_its_own_targets(network, r):
    estimator, _, dense, variables, dataset, _ = network
    x = normalize(jnp.asarray(dataset.test.images))
    inputs, work, area = 3, 0.0, 8 * 8
    for index, features in enumerate(f for f in PLAN if f != "M"):
        unit = {kind: variables[kind][f"unit{index}"] for kind in ("params", "batch_stats")}
        x = ftwt.GatedUnit(features, use_bias=True).apply(unit, x).values
        mask = np.asarray(ftwt.topk_mass_mask(x, r))
        heads = (3, 8, 12)[index] * features
        work = work + area * 9 * inputs * mask.sum(-1) + heads
        inputs = mask.sum(-1)
        x = jnp.where(mask[:, None, None, :], x, 0)
        if index == 0:
            x, area = x.reshape(50, 4, 2, 4, 2, 8).max((2, 4)), 4 * 4
    work = work + inputs * 4
    total = ftwt.dense_macs(jax.eval_shape(dense.apply, variables, jnp.zeros((1, 8, 8, 3))))
    found = estimator.predict(r)
    assert found.samples == 50
    assert found.macs_reduction == pytest.approx(1 - work.mean() / total, abs=1e-6)


def test_reduction_falls_as_r_grows(network):
    reductions = [network[0].predict(r).macs_reduction for r in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert reductions == sorted(reductions, reverse=True)


@pytest.mark.parametrize("budget", [0.45, 0.6, 0.85])
def test_solving_for_a_budget_gives_an_r_that_predicts_it(network, budget):
    r, found = network[0].solve(budget)
    assert found.macs_reduction == pytest.approx(budget, abs=0.02)
    assert network[0].predict(r).macs_reduction == found.macs_reduction


@pytest.mark.parametrize(
    ("budget", "says"), [(0.999, "can be cut by"), (0, "between 0 and 1"), (1.2, "between 0 and 1")]
)
def test_a_budget_out_of_reach_is_refused_with_the_range(network, budget, says):
    with pytest.raises(ftwt.UserError, match=says):
        network[0].solve(budget)


def test_a_sweep_compiles_once(network):
    estimator, evaluator = network[0], network[-1]
    for r in np.linspace(0.1, 1, 7):
        estimator.predict(float(r))
    assert evaluator._step._cache_size() == 1


def test_evaluation_ignores_the_examples_that_fill_the_last_batch(network):
    _, model, _, variables, dataset, _ = network
    full = init_from_dense(model, variables, jnp.zeros((1, 8, 8, 3)), jax.random.key(2))
    one, many = (
        Evaluator(model, normalize, data_mesh()).run(full, eval_batches(dataset, dataset.test, size), 0.7)
        for size in (50, 16)
    )
    assert (one.samples, one.accuracy) == (many.samples, many.accuracy)
    assert one.macs_reduction == pytest.approx(many.macs_reduction, abs=1e-6)
    assert one.gates == many.gates
    outputs = model.apply(full, normalize(jnp.asarray(dataset.test.images)), control=ftwt.GateControl(r=0.7))
    report = ftwt.summarize_gates(ftwt.count_gates(outputs.gates), 50)
    assert one.gates.gate_accuracy == pytest.approx(report.gate_accuracy)
    assert one.macs_reduction == pytest.approx(1 - ftwt.macs(outputs).mean() / ftwt.dense_macs(outputs), abs=1e-6)
