"""A training step on one device, on eight, in parts and in bfloat16: the same numbers, and small collectives."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ftwt_jax as ftwt
from ftwt_jax.data.augment import make_augment
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.gating.units import GatedUnit
from ftwt_jax.plan import collectives, hlo
from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.training.stage import make_stage
from tests.conftest import ROOT, fails
from tests.helpers.ten_steps import (
    DEVICES,
    IMAGES,
    NETWORKS,
    PARTS,
    PLACES,
    PROGRAMS,
    STEPS,
    TEN_STEPS,
    VARIANTS,
    R,
    assert_close,
    make,
    named,
    results,
    short_networks,
    start,
)

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]
COLLECTIVE = r"(?:all-|reduce-scatter|ragged-all-|collective-|send|recv)[\w-]*"


def on_eight_devices(what: str, folder):
    settings = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "tests.helpers.ten_steps", what, str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=True, timeout=500)
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The text of the programs compiled for eight devices."""
    folder = on_eight_devices("programs", tmp_path_factory.mktemp("programs"))
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """Ten steps on eight devices: the numbers of each variant by name, and further facts."""
    folder = on_eight_devices("numbers", tmp_path_factory.mktemp("numbers"))
    numbers = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    return numbers, json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def on_one(quick_compilation):
    """Ten steps on this one device: the numbers of each variant."""
    assert jax.device_count() == 1
    return {name: numbers for name, numbers, _, _ in results(("at once", "parts"))}


def find_unexpected(text: str, network: str, stage: str, kinds=("all-reduce",)):
    """Finds what collectives carry besides gradients, batch statistics and metrics, and collectives of other kinds.

    Compilers reshape kernels, so arrays are recognized by their number of elements.

    Returns:
      the unexpected arrays and their kinds; numbers exchanged by kind; number of parameters.
    """
    run = make(NETWORKS[network], batch_size=IMAGES)
    with short_networks():
        shapes = run.abstract_variables(stage)
        images = jax.ShapeDtypeStruct((IMAGES, *run.dataset.image_shape), jnp.float32)
        layers = jax.eval_shape(run.models[stage].apply, shapes, images).layers
    units = [layer for layer in layers if layer.unit]
    known = {leaf.size for leaf in jax.tree.leaves(shapes)} | {1, len(units)}
    for unit in units:
        of_one = {unit.positions, unit.positions * unit.out_features}
        sizes = of_one | {n * size for n in (IMAGES // DEVICES, IMAGES) for size in {1, unit.out_features, *of_one}}
        assert not sizes & known, f"maps or masks of {unit.name} cannot be distinguished from parameters"

    found = collectives.find_collectives(hlo.parse(text))
    assert len(found) == len(re.findall(rf"^ +(?:ROOT )?%?\S+ = .*? {COLLECTIVE}\(", text, flags=re.MULTILINE))
    exchanged = [(one.kind, one.times, array) for one in found for array in one.arrays]
    unexpected = [(kind, array) for kind, _, array in exchanged if kind not in kinds or array.size not in known]
    numbers = {kind: sum(times * array.size for like, times, array in exchanged if like == kind) for kind in kinds}
    return unexpected, numbers, sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if "divided" not in name])
def test_devices_exchange_only_gradients_statistics_and_metrics(programs, name):
    network, stage, _ = PROGRAMS[name]
    unexpected, numbers, parameters = find_unexpected(programs[name], network, stage)
    assert unexpected == []
    assert numbers["all-reduce"] > parameters


def test_a_sharded_optimizer_also_gathers_parameters(programs):
    unexpected, numbers, parameters = find_unexpected(
        programs["vgg divided"], "vgg", GATED, ("all-reduce", "all-gather")
    )
    assert unexpected == []
    assert 0 < numbers["all-gather"] <= parameters


# Our own kernels would gather the maps of all images; without a compiler, XLA would add up maps of one.
@pytest.mark.parametrize(
    ("name", "sizes"), [("maps", {IMAGES * 8 * 8 * 24, 8 * 8 * 24}), ("masks", {IMAGES * 24})], ids=["maps", "masks"]
)
def test_an_exchange_of_maps_or_masks_would_be_found(programs, name, sizes):
    unexpected, _, _ = find_unexpected(programs[name], "vgg", BASELINE, collectives.KINDS)
    assert sizes & {array.size for _, array in unexpected}


@pytest.mark.parametrize("variant", [BASELINE, "at once", "parts"])
def test_eight_devices_train_as_one_does(on_one, on_eight, variant):
    numbers, facts = on_eight
    assert facts["devices"] == DEVICES
    assert_close(numbers[variant], on_one[variant], 1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_images_on_eight_devices_train_as_those_from_the_host_of_one(on_one, on_eight, place):
    numbers, _ = on_eight
    assert_close(numbers[place], on_one["at once"], 1e-5)


def test_gates_differ_from_step_to_step_and_are_neither_open_nor_shut(on_one):
    """Otherwise ten steps would show little."""
    numbers = on_one["at once"]
    assert len(set(numbers["density"])) > STEPS // 2
    assert all(0.1 < density < 0.9 for density in numbers["density"])


def test_steps_compile_once_on_eight_devices(on_eight):
    _, facts = on_eight
    assert set(facts["compiled"]) == {BASELINE, *VARIANTS, *PLACES}
    assert set(facts["compiled"].values()) == {1}


def test_a_sharded_optimizer_takes_the_same_steps(on_eight):
    numbers, _ = on_eight
    assert_close(numbers["divided"], numbers["at once"], 1e-6)


def test_each_device_holds_its_share_of_a_sharded_optimizer(on_eight):
    _, facts = on_eight
    momenta = [one for one in facts["divided"] if any(side % DEVICES == 0 for side in one["shape"])]
    assert len(momenta) > 10
    for one in momenta:
        assert len({place for place, _ in one["held"]}) == DEVICES
        assert {math.prod(shape) for _, shape in one["held"]} == {math.prod(one["shape"]) // DEVICES}


def reference_in_parts(run, stage, state, batches, control):
    """Steps in parts, written for clarity: the state and the metrics of each step."""

    @jax.jit
    def loss_and_grads(params, batch_stats, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            outputs, updates = run.models[GATED].apply(
                variables, run.normalize(images), train=True, control=control, mutable=["batch_stats"]
            )
            chances = jax.nn.log_softmax(outputs.logits)
            entropy = -jnp.mean(chances[jnp.arange(len(labels)), labels])
            gates = ftwt.gate_loss(outputs.gates)
            accuracy = jnp.mean(outputs.logits.argmax(-1) == labels)
            return entropy + run.config.gates.loss_weight * gates, (entropy, gates, accuracy, updates["batch_stats"])

        return jax.grad(loss, has_aux=True)(params)

    augment, seen = make_augment(run.dataset, stage.seed), []
    params, batch_stats, opt_state = state.params, state.batch_stats, state.opt_state
    for batch in batches:
        images, parts, rows = augment(batch["image"], batch["position"]), [], []
        for part in range(PARTS):
            mine = slice(part, None, PARTS)
            grads, (*row, batch_stats) = loss_and_grads(params, batch_stats, images[mine], batch["label"][mine])
            parts.append(grads)
            rows.append(row)
        grads = jax.tree.map(lambda *every: sum(every) / PARTS, *parts)
        changes, opt_state = stage.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, changes)
        seen.append([*np.mean(rows, axis=0), optax.tree.norm(grads)])
    metrics = dict(zip(("loss", "gate_loss", "accuracy", "grad_norm"), np.transpose(seen), strict=True))
    return metrics | named(
        state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state, step=state.step + STEPS)
    )


def test_a_step_in_parts_takes_the_mean_of_their_gradients(on_one):
    run = make(accumulate=PARTS)
    stage, state, batches, control = start(run, GATED)
    wanted = reference_in_parts(run, stage, state, batches, control)
    numbers = on_one["parts"]
    assert_close({name: numbers[name] for name in wanted}, wanted, 1e-5)


def test_a_step_in_parts_takes_less_memory():
    needs = []
    for parts in (1, PARTS):
        stage = make_stage(make(accumulate=parts), BASELINE)
        compiled = stage.step.lower(stage.state, stage.batch, stage.control).compile()
        needs.append(compiled.memory_analysis().temp_size_in_bytes)
    assert needs[1] < needs[0] / 2


def test_a_batch_that_devices_and_parts_cannot_share_is_refused(on_eight):
    _, facts = on_eight
    assert facts["status"] == 2
    assert facts["error"] == (
        "ftwt: error: config.batch_size=72 must be a positive multiple of 32: 8 devices times config.accumulate=4\n"
    )


def test_zero_parts_are_refused(capsys, tmp_path):
    error = fails(capsys, "train", *TEN_STEPS, "--config.accumulate=0", f"--workdir={tmp_path / 'run'}")
    assert "config.accumulate" in error
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def in_bfloat16():
    """A gated stage that computes in bfloat16: the run, the stage, its variables, and a batch."""
    run = make((*TEN_STEPS, "--config.model.dtype=bfloat16"))
    stage, state, batches, _ = start(run, GATED)
    return run, stage, state.variables, next(batches)


def forward(run, variables, images, **options):
    return run.models[GATED].apply(variables, run.normalize(images), train=True, **options)


def test_in_bfloat16_parameters_and_losses_stay_float32(in_bfloat16):
    run, stage, variables, batch = in_bfloat16
    state, metrics = jax.eval_shape(stage.step, stage.state, stage.batch, stage.control)
    outputs, _ = jax.eval_shape(lambda v: forward(run, v, batch["image"], mutable=["batch_stats"]), variables)
    logits = [outputs.logits, *(gate.logits for gate in outputs.gates)]
    floats = [leaf for leaf in jax.tree.leaves((state, metrics, logits)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert len(floats) > len(jax.tree.leaves(variables)) + len(metrics)


def test_in_bfloat16_convolutions_and_their_gradients_run_in_it(in_bfloat16):
    _, stage, _, _ = in_bfloat16
    text = stage.step.lower(stage.state, stage.batch, stage.control).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    # Forward, by kernel, and by input, which the first has none of.
    assert len(convolutions) == 2 * 3 - 1
    for line in convolutions:
        assert set(re.findall(r"\dx([a-z]\w*)>", line)) == {"bf16"}


def test_in_bfloat16_targets_are_ranked_in_float32(in_bfloat16):
    run, _, variables, batch = in_bfloat16

    @jax.jit
    def maps_and_targets(variables):
        outputs, kept = forward(
            run,
            variables,
            batch["image"],
            control=GateControl(r=R, masks="open"),
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, GatedUnit),
        )
        units = (kept["intermediates"][name] for name in outputs.gate_names)
        return [unit["__call__"][0].values for unit in units], [gate.target for gate in outputs.gates]

    for maps, target in zip(*maps_and_targets(variables), strict=True):
        assert maps.dtype == jnp.bfloat16
        np.testing.assert_array_equal(target, ftwt.topk_mass_mask(maps.astype(jnp.float32), R))
        assert 0 < target.mean() < 1
