"""Gate settings, the gate head, which loss trains what, and whether gates are right and dynamic at all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ftwt_jax as ftwt
from ftwt_jax.gating.gates import current_fields
from ftwt_jax.models.resnet import ResNet
from tests.conftest import random_like

pytestmark = pytest.mark.long

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
LABELS = jnp.asarray([0, 1, 2, 3])


def random_variables(model, images, seed=0):
    """Variables of the right shapes with nothing left at its first value, gate heads included."""
    return random_like(jax.eval_shape(model.init, KEY, images), seed)


def random_gates(seed=0, samples=6, filters=(5, 8, 3)):
    """Gates of three units with independent random logits, masks and targets."""
    rng = np.random.default_rng(seed)
    return tuple(
        ftwt.GateOutput(
            logits=jnp.asarray(3 * rng.normal(size=(samples, c)), jnp.float32),
            mask=jnp.asarray(rng.random((samples, c)) < rng.choice([0, 0.5, 1], size=c, p=[0.2, 0.6, 0.2])),
            target=jnp.asarray(rng.random((samples, c)) < 0.7),
        )
        for c in filters
    )


class TestGateConfig:
    @pytest.mark.parametrize("r", [0, -0.1, 1.0001, 90, float("nan"), float("inf"), "0.9", None, True])
    def test_r_outside_0_to_1_is_refused_with_its_range(self, r):
        with pytest.raises(ftwt.UserError, match=r"\br\b.*\(0, 1\].*got") as refused:
            ftwt.GateConfig(r=r)
        assert repr(r) in str(refused.value)

    @pytest.mark.parametrize("r", [1, 0.5, 1e-6, np.float32(0.5), np.float64(0.5)])
    def test_r_in_range_is_kept_as_a_plain_float(self, r):
        config = ftwt.GateConfig(r=r)
        assert type(config.r) is float
        assert config.r == r

    @pytest.mark.parametrize(
        ("field", "value", "nearest"),
        [
            ("mode", "join", "joint"),
            ("mode", "decouple", "decoupled"),
            ("pool", "maximum", "max"),
            ("pool", "means", "mean"),
        ],
    )
    def test_a_misspelt_choice_names_the_field_the_nearest_and_all(self, field, value, nearest):
        with pytest.raises(ftwt.UserError, match=field) as refused:
            ftwt.GateConfig(**{field: value})
        message = str(refused.value)
        assert f"did you mean {nearest!r}?" in message
        known = {"mode": "decoupled, joint", "pool": "max, mean"}[field]
        assert message.endswith(f"known: {known}")

    @pytest.mark.parametrize("field", ["mode", "pool"])
    @pytest.mark.parametrize("value", ["", 3, None])
    def test_a_choice_like_no_other_lists_all_without_guessing(self, field, value):
        with pytest.raises(ftwt.UserError, match=rf"{field}.*known: ") as refused:
            ftwt.GateConfig(**{field: value})
        assert "did you mean" not in str(refused.value)

    @pytest.mark.parametrize("value", [-1, 1.5, "2", None])
    def test_min_filters_must_count_filters(self, value):
        with pytest.raises(ftwt.UserError, match="min_filters") as refused:
            ftwt.GateConfig(min_filters=value)
        assert repr(value) in str(refused.value)

    @pytest.mark.parametrize("value", ["off", "false", None])
    def test_a_switch_is_on_or_off_and_nothing_else(self, value):
        with pytest.raises(ftwt.UserError, match="after_block"):
            ftwt.GateConfig(after_block=value)

    def test_an_unknown_norm_names_the_nearest(self):
        with pytest.raises(ftwt.UserError, match=r"norm of the gate heads.*'layer'\?"):
            ftwt.GateConfig(norm="layers")

    def test_settings_are_values_that_can_be_compared_and_hashed(self):
        assert ftwt.GateConfig(r=1) == ftwt.GateConfig(r=1.0) != ftwt.GateConfig(r=0.5)
        assert len({ftwt.GateConfig(), ftwt.GateConfig(), ftwt.GateConfig(pool="mean")}) == 2

    def test_the_default_head_is_the_one_that_the_configs_train(self):
        config = ftwt.GateConfig()
        assert (config.pool, config.norm, config.depthwise) == ("max", "layer", "own")
        assert (config.mode, config.after_block, config.min_filters) == ("decoupled", False, 1)

    def test_the_head_of_the_paper_differs_in_norm_and_depthwise_heads_alone(self):
        assert ftwt.GateConfig.paper() == ftwt.GateConfig(pool="max", norm="softmax", depthwise="full")

    def test_the_head_of_the_paper_takes_changes(self):
        published = ftwt.GateConfig.paper(r=0.8, pool="mean", min_filters=0)
        assert published == ftwt.GateConfig(0.8, pool="mean", norm="softmax", depthwise="full", min_filters=0)
        assert ftwt.GateConfig.paper(norm="none").norm == "none"
        with pytest.raises(TypeError, match="softmax"):
            ftwt.GateConfig.paper(softmax=True)


class TestCurrentFields:
    @pytest.mark.parametrize(
        ("written", "norm", "depthwise"),
        [
            ({}, "softmax", "full"),
            ({"softmax": True}, "softmax", "full"),
            ({"softmax": False}, "none", "full"),
            ({"softmax": True, "norm": "layer", "depthwise": "own"}, "layer", "own"),
            ({"softmax": True, "norm": "softmax"}, "softmax", "full"),
            ({"softmax": False, "norm": "layer", "depthwise": "own"}, "none", "own"),
            ({"norm": "none", "depthwise": "own"}, "none", "own"),
            ({"norm": "layer", "depthwise": "full"}, "layer", "full"),
        ],
    )
    def test_files_of_every_age_name_the_head_that_they_trained(self, written, norm, depthwise):
        fields = current_fields({"r": 0.7, "pool": "mean", "min_filters": 0, **written})
        assert ftwt.GateConfig(**fields) == ftwt.GateConfig(
            r=0.7, pool="mean", min_filters=0, norm=norm, depthwise=depthwise
        )

    @pytest.mark.parametrize("config", [ftwt.GateConfig(), ftwt.GateConfig.paper(r=0.5), ftwt.GateConfig(norm="none")])
    def test_fields_of_today_stay_as_they_are(self, config):
        fields = dataclasses.asdict(config)
        assert current_fields(fields) == fields

    def test_other_fields_pass_through_and_the_argument_stays(self):
        written = {"softmax": False, "budget": 0.5}
        assert current_fields(written) == {"norm": "none", "depthwise": "full", "budget": 0.5}
        assert written == {"softmax": False, "budget": 0.5}

    @pytest.mark.parametrize("value", ["no", None, 1])
    def test_a_switch_that_is_neither_on_nor_off_is_refused(self, value):
        with pytest.raises(ftwt.UserError, match=r"softmax is True or False; got"):
            current_fields({"softmax": value})


class TestGateControl:
    def test_an_unknown_source_of_masks_names_the_nearest(self):
        with pytest.raises(ftwt.UserError, match=r"masks.*'targets'\? known: heads, targets, open"):
            ftwt.GateControl(masks="target")

    def test_masks_from_targets_need_targets(self):
        with pytest.raises(ftwt.UserError, match=r"masks='targets'.*leave targets=True"):
            ftwt.GateControl(masks="targets", targets=False)

    def test_only_r_and_offset_are_traced(self):
        assert jax.tree.leaves(ftwt.GateControl(r=0.3, masks="open", targets=False)) == [0.3]
        assert jax.tree.leaves(ftwt.GateControl(offset=-0.5)) == [-0.5]
        assert jax.tree.leaves(ftwt.GateControl()) == []

    def test_r_overrides_the_config_and_a_sweep_traces_once(self):
        model = ftwt.create_model("vgg_bn", 4, plan=(12, "M", 16), gates=ftwt.GateConfig(r=0.5))
        variables = random_variables(model, IMAGES)
        traces = []

        @jax.jit
        def targets(r):
            traces.append(r)
            return [g.target for g in model.apply(variables, IMAGES, control=ftwt.GateControl(r=r)).gates]

        swept = {r: targets(r) for r in (0.3, 0.5, 0.8, 1.0)}
        assert len(traces) == 1
        kept = [sum(int(t.sum()) for t in swept[r]) for r in (0.3, 0.5, 0.8, 1.0)]
        assert kept == sorted(set(kept))
        own = jax.jit(lambda: [g.target for g in model.apply(variables, IMAGES).gates])()
        jax.tree.map(np.testing.assert_array_equal, own, swept[0.5])

    def test_open_turns_every_filter_on_without_asking_the_heads(self):
        unit = ftwt.GatedUnit(6, gates=ftwt.GateConfig(r=0.5))
        variables = random_variables(unit, IMAGES)
        x = ftwt.Activations(IMAGES, control=ftwt.GateControl(masks="open"))
        gate = unit.apply(variables, x).layers[-1].gate
        assert gate.logits is None
        assert gate.mask.all()
        assert not gate.target.all()

    def test_min_filters_reaches_the_targets(self):
        def kept(min_filters):
            unit = ftwt.GatedUnit(6, gates=ftwt.GateConfig(r=0.01, min_filters=min_filters))
            gate = unit.apply(random_variables(unit, IMAGES), IMAGES).layers[-1].gate
            return gate.target.sum(axis=-1)

        for min_filters in (0, 1, 4):
            np.testing.assert_array_equal(kept(min_filters), min_filters)


def reference_head(inputs, kernel, bias, pool, norm):
    samples, _, _, channels = inputs.shape
    summary = np.zeros((samples, channels))
    for n in range(samples):
        for c in range(channels):
            pixels = inputs[n, :, :, c].astype(np.float64)
            summary[n, c] = pixels.max() if pool == "max" else pixels.mean()
        if norm == "softmax":
            powers = np.exp(summary[n] - summary[n].max())
            summary[n] = powers / powers.sum() * channels
        if norm == "layer":
            summary[n] = (summary[n] - summary[n].mean()) / np.sqrt(summary[n].var() + 1e-5)
    return summary @ kernel + bias


class TestGateHead:
    @pytest.mark.device
    @pytest.mark.parametrize("norm", ["softmax", "layer", "none"])
    @pytest.mark.parametrize("pool", ["max", "mean"])
    def test_logits_are_those_of_the_formula(self, pool, norm):
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(5, 4, 3, 7)).astype(np.float32)
        kernel, bias = rng.normal(size=(7, 9)), rng.normal(size=9)
        head = ftwt.GateHead(9, pool, norm)
        logits = head.apply({"params": {"dense": {"kernel": kernel, "bias": bias}}}, inputs)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, reference_head(inputs, kernel, bias, pool, norm), rtol=1e-4, atol=1e-5)

    def test_defaults_are_maximum_and_layer_norm(self):
        inputs = np.random.default_rng(1).normal(size=(2, 3, 3, 4)).astype(np.float32)
        variables = random_variables(ftwt.GateHead(5), inputs)
        np.testing.assert_array_equal(
            ftwt.GateHead(5).apply(variables, inputs), ftwt.GateHead(5, "max", "layer").apply(variables, inputs)
        )

    def test_a_published_kernel_divided_by_c_in_gives_the_published_logits(self):
        rng = np.random.default_rng(2)
        inputs = rng.normal(size=(3, 4, 4, 16)).astype(np.float32)
        kernel, bias = rng.normal(size=(16, 6)), rng.normal(size=6)
        published = np.asarray(jax.nn.softmax(inputs.max(axis=(1, 2)), axis=-1)) @ kernel + bias
        logits = ftwt.GateHead(6, norm="softmax").apply(
            {"params": {"dense": {"kernel": kernel / 16, "bias": bias}}}, inputs
        )
        np.testing.assert_allclose(logits, published, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("channels", [16, 512, 2048])
    def test_every_filter_starts_on_even_where_one_channel_takes_the_whole_softmax(self, channels):
        inputs = 1000 * jnp.eye(channels)[:8, None, None, :]
        logits, _ = ftwt.GateHead(512, norm="softmax").init_with_output(KEY, inputs)
        assert (logits > 0).all()

    @pytest.mark.parametrize("norm", ["softmax", "layer", "none"])
    def test_every_filter_starts_on(self, norm):
        inputs = 100 * jax.random.normal(KEY, (3, 4, 4, 8))
        logits, variables = ftwt.GateHead(6, "max", norm).init_with_output(KEY, inputs)
        assert (logits > 0).all()
        assert variables["params"]["dense"]["kernel"].shape == (8, 6)

    def test_huge_activations_do_not_overflow_the_softmax(self):
        inputs = jnp.asarray([1e30, -1e30, 0]).reshape(1, 1, 1, 3)
        variables = {"params": {"dense": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}}
        np.testing.assert_allclose(ftwt.GateHead(3, norm="softmax").apply(variables, inputs), [[3, 0, 0]])

    @pytest.mark.parametrize("norm", ["softmax", "layer", "none"])
    def test_a_head_of_own_channels_is_one_whose_matrix_is_a_diagonal(self, norm):
        inputs = jax.random.normal(KEY, (3, 4, 4, 8))
        own, full = ftwt.GateHead(8, "max", norm, own=True), ftwt.GateHead(8, "max", norm)
        variables = random_variables(own, inputs)
        dense = variables["params"]["dense"]
        assert dense["kernel"].shape == (1, 8)
        whole = {"params": {"dense": {"kernel": jnp.diag(dense["kernel"][0]), "bias": dense["bias"]}}}
        np.testing.assert_allclose(own.apply(variables, inputs), full.apply(whole, inputs), rtol=1e-5, atol=1e-6)

    def test_maps_without_a_signal_do_not_divide_by_zero(self):
        logits, _ = ftwt.GateHead(6, norm="layer").init_with_output(KEY, jnp.ones((2, 3, 3, 4)))
        np.testing.assert_array_equal(logits, 1)

    @pytest.mark.parametrize("pool", ["max", "mean"])
    def test_half_precision_inputs_are_read_in_float32(self, pool):
        inputs = jax.random.normal(KEY, (2, 8, 8, 6), jnp.bfloat16)
        head = ftwt.GateHead(4, pool)
        variables = random_variables(head, inputs)
        np.testing.assert_array_equal(head.apply(variables, inputs), head.apply(variables, inputs.astype(jnp.float32)))
        assert head.apply(variables, inputs).dtype == jnp.float32


def is_head(path):
    return any(key.key == "gate_head" for key in path)


def small_resnet(**settings):
    gates = ftwt.GateConfig(r=0.7, **settings)
    return ResNet(4, stage_sizes=(1, 1), features=6, projection=False, stem="cifar", gates=gates)


NETWORKS = {
    "resnet": small_resnet,
    "resnet after block": functools.partial(small_resnet, after_block=True),
}
# What no later head reads: the last unit, and the classifier.
UNREAD = ("stage2_block0/conv2", "classifier")


@functools.cache
def gradients(network, mode):
    """Gradients of the task loss and of the gate loss, {path: array} each."""
    model = NETWORKS[network](mode=mode)
    variables = random_variables(model, IMAGES)

    def losses(params):
        outputs, _ = model.apply({**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"])
        task = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, LABELS).mean()
        return task, ftwt.gate_loss(outputs.gates)

    @jax.jit
    def both(params):
        _, pull = jax.vjp(losses, params)
        return *pull((1.0, 0.0)), *pull((0.0, 1.0))

    task, gate = both(variables["params"])
    return dict(jax.tree_util.tree_leaves_with_path(task)), dict(jax.tree_util.tree_leaves_with_path(gate))


def slashed(path):
    return "/".join(key.key for key in path)


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
@pytest.mark.parametrize("network", NETWORKS)
class TestWhatALossTrains:
    def test_the_task_loss_never_trains_a_head(self, network, mode):
        task, _ = gradients(network, mode)
        heads = {path for path in task if is_head(path)}
        assert heads
        for path, gradient in task.items():
            assert np.any(gradient != 0) == (path not in heads) or "conv/bias" in slashed(path), slashed(path)

    def test_the_gate_loss_trains_every_head(self, network, mode):
        _, gate = gradients(network, mode)
        for path, gradient in gate.items():
            if is_head(path):
                assert np.any(gradient != 0), slashed(path)

    def test_the_gate_loss_moves_the_backbone_in_joint_mode_alone(self, network, mode):
        _, gate = gradients(network, mode)
        for path, gradient in gate.items():
            if is_head(path):
                continue
            if mode == "decoupled" or slashed(path).startswith(UNREAD):
                assert not np.any(gradient != 0), slashed(path)
            elif slashed(path).endswith("conv/kernel"):
                assert np.any(gradient != 0), slashed(path)


class TestGateLoss:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_loss_is_cross_entropy_summed_over_filters_and_averaged_over_samples(self, reduction):
        gates = random_gates()
        total = 0.0
        for gate in gates:
            p = 1 / (1 + np.exp(-np.asarray(gate.logits, np.float64)))
            g = np.asarray(gate.target, np.float64)
            total += np.mean(np.sum(-g * np.log(p) - (1 - g) * np.log(1 - p), axis=1))
        expected = total / len(gates) if reduction == "mean" else total
        loss = ftwt.gate_loss(gates, reduction)
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=1e-5)

    def test_the_mean_over_units_is_the_default(self):
        gates = random_gates(1)
        np.testing.assert_array_equal(ftwt.gate_loss(gates), ftwt.gate_loss(gates, "mean"))
        assert ftwt.gate_loss(gates, "sum") > 2 * ftwt.gate_loss(gates)

    def test_confident_and_wrong_logits_cost_their_size_and_not_infinity(self):
        gate = ftwt.GateOutput(jnp.asarray([[1e4, -1e4]]), jnp.asarray([[True, False]]), jnp.asarray([[False, True]]))
        np.testing.assert_allclose(ftwt.gate_loss([gate]), 2e4)

    def test_a_network_without_gates_has_no_gate_loss(self):
        assert ftwt.gate_loss(()) == 0

    def test_an_unknown_reduction_names_the_nearest(self):
        with pytest.raises(ftwt.UserError, match=r"reduction 'means'.*'mean'\? known: mean, sum"):
            ftwt.gate_loss(random_gates(), "means")

    @pytest.mark.parametrize("missing", ["logits", "target"])
    def test_gates_without_logits_or_targets_are_refused_with_the_mend(self, missing):
        gates = [gate.replace(**{missing: None}) for gate in random_gates()]
        with pytest.raises(ftwt.UserError, match="call the model with the default GateControl"):
            ftwt.gate_loss(gates)


def reference_report(gates, keep):
    """Gate accuracy, static gate accuracy, dynamic filters and density, filter by filter over the samples in `keep`."""
    accuracy, static, density, dynamic = [], [], [], []
    for gate in gates:
        mask, target = np.asarray(gate.mask)[keep], np.asarray(gate.target)[keep]
        per_filter_static = []
        for f in range(mask.shape[1]):
            dynamic.append(len(set(mask[:, f])) == 2)
            per_filter_static.append(max(np.mean(target[:, f]), np.mean(~target[:, f])))
        accuracy.append(np.mean(mask == target))
        static.append(np.mean(per_filter_static))
        density.append(np.mean(mask))
    return np.mean(accuracy), np.mean(static), np.mean(dynamic), density


def check_report(report, reference):
    accuracy, static, dynamic, density = reference
    np.testing.assert_allclose(report.gate_accuracy, accuracy, rtol=1e-12)
    np.testing.assert_allclose(report.static_gate_accuracy, static, rtol=1e-12)
    np.testing.assert_allclose(report.dynamic_filters, dynamic, rtol=1e-12)
    np.testing.assert_allclose(report.density, density, rtol=1e-12)


class TestGateStats:
    @pytest.mark.parametrize("seed", range(3))
    def test_figures_are_those_of_the_definitions(self, seed):
        gates = random_gates(seed, samples=9)
        report = ftwt.summarize_gates(ftwt.count_gates(gates), samples=9)
        check_report(report, reference_report(gates, np.arange(9)))
        assert 0 < report.dynamic_filters < 1

    def test_padding_does_not_count(self):
        gates = random_gates(3, samples=8)
        weight = jnp.asarray([1, 1, 0, 1, 1, 0, 1, 0], jnp.float32)
        report = ftwt.summarize_gates(ftwt.count_gates(gates, weight), samples=5)
        check_report(report, reference_report(gates, np.flatnonzero(weight)))
        assert report != ftwt.summarize_gates(ftwt.count_gates(gates), samples=8)

    def test_batches_add_up_to_the_whole_under_jit(self):
        gates = random_gates(4, samples=10)
        count = jax.jit(ftwt.count_gates)
        parts = [count(jax.tree.map(lambda a, s=s: a[s], gates)) for s in (slice(0, 4), slice(4, 10))]
        merged = jax.tree.map(jnp.add, *parts)
        jax.tree.map(np.testing.assert_array_equal, merged, ftwt.count_gates(gates))
        check_report(ftwt.summarize_gates(merged, samples=10), reference_report(gates, np.arange(10)))

    def test_units_weigh_the_same_however_many_filters_they_have(self):
        on, off = jnp.ones((2, 1), bool), jnp.zeros((2, 9), bool)
        gates = (ftwt.GateOutput(None, on, on), ftwt.GateOutput(None, off, ~off))
        report = ftwt.summarize_gates(ftwt.count_gates(gates), samples=2)
        assert (report.gate_accuracy, report.static_gate_accuracy, report.dynamic_filters) == (0.5, 1, 0)
        assert report.density == (1, 0)

    def test_a_static_gate_cannot_beat_the_best_fixed_mask(self):
        rng = np.random.default_rng(5)
        target = jnp.asarray(rng.random((20, 6)) < 0.6)
        majority = jnp.broadcast_to(jnp.mean(target, axis=0) >= 0.5, target.shape)
        report = ftwt.summarize_gates(ftwt.count_gates([ftwt.GateOutput(None, majority, target)]), samples=20)
        assert report.gate_accuracy == report.static_gate_accuracy < 1
        assert report.dynamic_filters == 0

    @pytest.mark.parametrize(("gates", "samples"), [((), 4), (random_gates(), 0)])
    def test_no_gates_or_no_samples_is_refused(self, gates, samples):
        with pytest.raises(ftwt.UserError, match=rf"got {len(gates)} gates, {samples} images"):
            ftwt.summarize_gates(ftwt.count_gates(gates), samples)
