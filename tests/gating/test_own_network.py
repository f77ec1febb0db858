"""A user's own network takes gates by the change that the README shows."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import ftwt_jax as ftwt
from tests.conftest import random_like, readme_blocks

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 4))
IMPORT = 1  # The line "import ftwt_jax as ftwt", which the README leaves out.


@pytest.fixture(scope="module")
def diff() -> list[str]:
    """The lines of the README's example, each behind "+", "-" or a blank."""
    (block,) = readme_blocks("diff")
    return block.splitlines()


def defined_by(lines):
    names = {"nn": nn, "ftwt": ftwt, "__name__": __name__}
    exec(compile("\n".join(lines), "README.md", "exec"), names)
    return names["SmallNet"]()


def network_before(diff):
    return defined_by([line[1:] for line in diff if line[0] != "+"])


def network_after(diff):
    return defined_by([line[1:] for line in diff if line[0] != "-"])


def random_variables(model, images):
    return random_like(jax.eval_shape(model.init, KEY, images))


def test_ten_changed_lines_or_fewer(diff):
    assert 0 < sum(line[0] in "+-" for line in diff) + IMPORT <= 10


def test_the_gated_network_is_the_users_own_until_gates_close(diff):
    dense, gated = network_before(diff), network_after(diff)
    plain = random_variables(dense, IMAGES)
    variables = random_variables(gated, IMAGES)
    for i, unit in enumerate(("GatedUnit_0", "GatedUnit_1")):
        variables["params"][unit] |= {"conv": plain["params"][f"Conv_{i}"], "bn": plain["params"][f"BatchNorm_{i}"]}
        variables["batch_stats"][unit]["bn"] = plain["batch_stats"][f"BatchNorm_{i}"]
    variables["params"]["Classifier_0"]["dense"] = plain["params"]["Dense_0"]

    for i in range(2):
        head = variables["params"][f"GatedUnit_{i}"]["gate_head"]["dense"]
        head["bias"] = head["bias"] + 100
    opened = gated.apply(variables, IMAGES)
    np.testing.assert_allclose(opened.logits, dense.apply(plain, IMAGES), rtol=1e-4, atol=1e-5)
    dense_macs = 64 * 9 * 4 * 8 + 16 * 9 * 8 * 16 + 16 * 10
    assert ftwt.dense_macs(opened) == dense_macs
    np.testing.assert_array_equal(ftwt.macs(opened), dense_macs + 4 * 8 + 8 * 16)

    for i in range(2):
        head = variables["params"][f"GatedUnit_{i}"]["gate_head"]["dense"]
        head["bias"] = head["bias"] - 100
    outputs, state = gated.apply(variables, IMAGES, True, mutable=["batch_stats"])
    assert state["batch_stats"].keys() == {"GatedUnit_0", "GatedUnit_1"}
    assert [gate.mask.shape for gate in outputs.gates] == [(3, 8), (3, 16)]
    assert np.all(ftwt.macs(outputs) < dense_macs)
    assert ftwt.gate_loss(outputs.gates) > 0
