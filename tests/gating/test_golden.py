"""The published code's own numbers: rankings, and a whole ResNet-8 with its losses and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ftwt_jax as ftwt
from tests.conftest import ROOT

# Compiled quickly, not to run quickly.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GOLDEN = ROOT / "tests" / "golden"
pytestmark = [pytest.mark.newest, pytest.mark.device]


def under(data, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start so, by the rest of their names."""
    return {name.removeprefix(prefix): data[name] for name in data if name.startswith(prefix)}


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_ranking_matches_every_published_mask(case):
    data = np.load(GOLDEN / "ranking.npz")
    maps = data[f"{case}/activations_nhwc"]
    np.testing.assert_array_equal(ftwt.filter_mass(maps), data[f"{case}/gmp"])
    for r in data[f"{case}/r"]:
        mask = ftwt.topk_mass_mask(maps, float(r), min_filters=0)
        np.testing.assert_array_equal(mask, data[f"{case}/mask_r{r:.2f}"], err_msg=f"r={r}")


@pytest.fixture(scope="module")
def golden():
    data = np.load(GOLDEN / "resnet8_decoupled.npz")
    gates = ftwt.GateConfig.paper(r=float(data["r"]), pool="mean")
    variables = ftwt.from_torch("resnet8", under(data, "state/"), 10, gates)
    images = jnp.asarray(data["x_nchw"].transpose(0, 2, 3, 1))
    return ftwt.create_model("resnet8", 10, gates=gates), variables, images, data


def test_evaluation_matches(golden):
    model, variables, images, data = golden
    outputs = quick(model.apply)(variables, images)
    np.testing.assert_allclose(outputs.logits, data["eval/logits"], rtol=1e-4, atol=1e-5)
    assert len(outputs.gates) == 7
    for i, gate in enumerate(outputs.gates):
        np.testing.assert_allclose(gate.logits, data[f"eval/mask_logits/{i}"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(gate.mask, data[f"eval/mask_logits/{i}"] > 0)
        np.testing.assert_array_equal(gate.target, data[f"eval/target/{i}"])
    np.testing.assert_array_equal(ftwt.macs(outputs, "published"), data["eval/flops_published"])


def test_training_losses_and_gradients_match(golden):
    model, variables, images, data = golden
    labels = jnp.asarray(data["y"])

    def loss(params):
        outputs, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        task = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels).mean()
        gate = ftwt.gate_loss(outputs.gates)
        return task + gate, (task, gate, outputs.gates)

    (_, (task, gate, gates)), grads = quick(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    np.testing.assert_allclose(task, data["train/cross_entropy"], rtol=1e-5)
    np.testing.assert_allclose(gate, data["train/gate_loss_mean_over_layers"], rtol=1e-5)
    report = ftwt.summarize_gates(ftwt.count_gates(gates), samples=len(labels))
    np.testing.assert_allclose(100 * report.gate_accuracy, data["train/gate_accuracy_percent"], rtol=1e-5)
    named = ftwt.to_torch("resnet8", {**variables, "params": grads}, 10, model.gates)
    published = under(data, "train/grad/module.")
    # Everything that is trained, once: no statistics and no second copies.
    assert len(published) == len(jax.tree.leaves(grads))
    for name, theirs in published.items():
        ours = named[name]
        if name.endswith("1Conv2dMask.weight"):
            # Our kernel is theirs over C_in, so its gradient is theirs times C_in; it left as a kernel does.
            ours = ours / ours.shape[1] ** 2
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-3, f"{name}: {error}"
