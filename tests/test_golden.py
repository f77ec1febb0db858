"""The published code's own numbers: rankings, and a whole ResNet-8 with its losses and gradients."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ftwt_jax as ftwt

GOLDEN = pathlib.Path(__file__).parent / "golden"
LAYERS = {"": "stem", **{f"layer{s}.0.": f"stage{s}_block0" for s in (1, 2, 3)}}


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_ranking_matches_every_published_mask(case):
    data = np.load(GOLDEN / "ranking.npz")
    maps = data[f"{case}/activations_nhwc"]
    np.testing.assert_array_equal(ftwt.filter_mass(maps), data[f"{case}/gmp"])
    for r in data[f"{case}/r"]:
        mask = ftwt.topk_mass_mask(maps, float(r), min_filters=0)
        np.testing.assert_array_equal(mask, data[f"{case}/mask_r{r:.2f}"], err_msg=f"r={r}")


def published_names() -> dict[tuple[str, ...], str]:
    """Our parameter path -> the published name, for ResNet-8."""
    names: dict[tuple[str, ...], str] = {
        ("classifier", "dense", "kernel"): "fc.weight",
        ("classifier", "dense", "bias"): "fc.bias",
    }
    for prefix, ours in LAYERS.items():
        units = (
            [((ours,), "1", "masked_conv")]
            if not prefix
            else [((ours, f"conv{i}"), i, f"masked_conv{i}") for i in "12"]
        )
        for path, number, masked in units:
            names[(*path, "conv", "kernel")] = f"{prefix}conv{number}.weight"
            for our_leaf, leaf in (
                ("scale", "weight"),
                ("bias", "bias"),
                ("mean", "running_mean"),
                ("var", "running_var"),
            ):
                names[(*path, "bn", our_leaf)] = f"{prefix}bn{number}.{leaf}"
            names[(*path, "gate_head", "dense", "kernel")] = f"{prefix}{masked}.mask.model.1Conv2dMask.weight"
            names[(*path, "gate_head", "dense", "bias")] = f"{prefix}{masked}.mask.model.1Conv2dMask.bias"
    return names


def as_ours(path: tuple[str, ...], value: np.ndarray, gradient: bool = False) -> np.ndarray:
    """A published array in our layout; a head's kernel carries the factor C_in the other way round."""
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
    if "dense" in path and path[-1] == "kernel":
        value = value.squeeze((0, 1)) if value.ndim == 4 else value.T
    if "gate_head" in path and path[-1] == "kernel":
        value = value * value.shape[0] if gradient else value / value.shape[0]
    return value


@pytest.fixture(scope="module")
def golden():
    data = np.load(GOLDEN / "resnet8_decoupled.npz")
    variables: dict = {}
    for path, name in published_names().items():
        node = variables.setdefault("batch_stats" if path[-1] in ("mean", "var") else "params", {})
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(as_ours(path, data[f"state/module.{name}"]))
    model = ftwt.create_model("resnet8", 10, gates=ftwt.GateConfig(r=float(data["r"]), pool="mean"))
    images = jnp.asarray(data["x_nchw"].transpose(0, 2, 3, 1))
    return model, variables, images, data


def test_evaluation_matches(golden):
    model, variables, images, data = golden
    outputs = model.apply(variables, images, train=False)
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

    (_, (task, gate, gates)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    np.testing.assert_allclose(task, data["train/cross_entropy"], rtol=1e-5)
    np.testing.assert_allclose(gate, data["train/gate_loss_mean_over_layers"], rtol=1e-5)
    report = ftwt.summarize_gates(ftwt.count_gates(gates), samples=len(labels))
    np.testing.assert_allclose(100 * report.gate_accuracy, data["train/gate_accuracy_percent"], rtol=1e-5)
    for path, name in published_names().items():
        if path[-1] in ("mean", "var"):
            continue
        ours = grads
        for key in path:
            ours = ours[key]
        theirs = as_ours(path, data[f"train/grad/module.{name}"], gradient=True)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-3, f"{'/'.join(path)}: {error}"
