"""The convolution against XLA's: values and gradients, also under jit, vmap and export."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import export, lax

from ftwt_jax.ops import native
from ftwt_jax.ops.convolution import conv_general_dilated, training_convolution
from tests.conftest import random_like

NHWC = ("NHWC", "HWIO", "NHWC")
SIDES = st.integers(1, 9)
# Large depthwise kernels take long to compile, so there are few.
KERNELS = st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 3), (3, 2), (2, 5), (5, 1), (7, 1), (1, 7), (7, 7)])
STEPS = st.integers(1, 3)
PADS = st.tuples(st.integers(0, 8), st.integers(0, 8))
# Groups, input features, output features. At most 5 per group: see `signs`.
FEATURES = {
    "plain": (1, 5, 3),
    "one input": (1, 1, 4),
    "one output": (1, 4, 1),
    "one of each": (1, 1, 1),
    "depthwise": (5, 5, 5),
    "depthwise with multiplier": (3, 3, 6),
    "grouped": (2, 4, 6),
}
# Map, kernel, strides, padding, groups: one for every lowering on a CPU.
CASES = {
    "depthwise": ((2, 6, 7, 8), (3, 3, 1, 8), (2, 1), "SAME", 8),
    "1x1": ((3, 9, 8, 6), (1, 1, 6, 5), (1, 1), "VALID", 1),
    "strided 1x1": ((3, 9, 8, 6), (1, 1, 6, 5), (2, 3), "VALID", 1),
    "few pixels": ((2, 2, 2, 8), (3, 3, 8, 6), (1, 1), "SAME", 1),
    "few pixels in many samples": ((80, 2, 1, 4), (3, 3, 4, 3), (1, 1), "SAME", 1),
    "one small sample": ((1, 8, 8, 4), (3, 3, 4, 6), (1, 1), "SAME", 1),
    "many pixels": ((2, 9, 9, 4), (3, 3, 4, 6), (1, 1), "SAME", 1),
    "grouped": ((2, 2, 2, 8), (3, 3, 4, 6), (1, 1), "SAME", 2),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_kind = pytest.mark.parametrize("name", ["depthwise", "1x1", "few pixels"])


def signs(rng, shape, dtype):
    """-1, 0 and 1: no sum here has more than 256 terms, which even bfloat16 adds without rounding in any order."""
    return jnp.asarray(rng.integers(-1, 2, shape), dtype)


def normals(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def operands(case, dtype=jnp.float32):
    return normals(case[0], 0, dtype), normals(case[1], 1, dtype)


def both(case, **options):
    """The convolution of a case, and XLA's."""
    _, _, strides, padding, groups = case
    given = {"window_strides": strides, "padding": padding, "feature_group_count": groups, "dimension_numbers": NHWC}
    return [functools.partial(conv, **given | options) for conv in (conv_general_dilated, lax.conv_general_dilated)]


def assert_close(ours, xlas, tolerance=2e-6):
    """Equal up to rounding relative to the largest number of each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(xlas), strict=True):
        assert a.dtype == b.dtype
        b = np.asarray(b, np.float32)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def value_and_gradients(conv, lhs, rhs, cotangent):
    out, pull = jax.vjp(conv, lhs, rhs)
    return out, *pull(cotangent)


@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(1, 3),
    sides=st.tuples(SIDES, SIDES),
    kernel=KERNELS,
    strides=st.tuples(STEPS, STEPS),
    padding=st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(PADS, PADS)),
    features=st.sampled_from(list(FEATURES)),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_equal_xlas(samples, sides, kernel, strides, padding, features, dtype, seed):
    groups, in_features, out_features = FEATURES[features]
    rng = np.random.default_rng(seed)
    lhs = signs(rng, (samples, *sides, in_features), dtype)
    rhs = signs(rng, (*kernel, in_features // groups, out_features), dtype)
    ours, xlas = both((lhs.shape, rhs.shape, strides, padding, groups))
    out = jax.eval_shape(xlas, lhs, rhs)
    assume(out.size > 0)
    cotangent = signs(rng, out.shape, dtype)
    compare = jax.jit(lambda *arrays: [value_and_gradients(conv, *arrays) for conv in (ours, xlas)])
    for a, b in zip(*compare(lhs, rhs, cotangent), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)


def compared(case, dtype=jnp.float32, **options):
    """Value and gradients of the convolution of a case, and XLA's."""
    lhs, rhs = operands(case, dtype)
    ours, xlas = both(case, **options)
    cotangent = normals(jax.eval_shape(xlas, lhs, rhs).shape, 2, dtype)
    return jax.jit(lambda *arrays: [value_and_gradients(conv, *arrays) for conv in (ours, xlas)])(lhs, rhs, cotangent)


@every_case
def test_values_and_gradients_of_real_numbers_equal_xlas_up_to_rounding(case):
    assert_close(*compared(case))


@every_kind
def test_in_bfloat16_they_equal_xlas_up_to_its_rounding(name):
    assert_close(*compared(CASES[name], jnp.bfloat16), 2e-2)


@every_kind
def test_outside_jit_the_value_is_the_same(name):
    ours, xlas = both(CASES[name])
    assert_close(ours(*operands(CASES[name])), xlas(*operands(CASES[name])))


@every_kind
def test_forward_derivatives_equal_xlas(name):
    case = CASES[name]
    lhs, rhs = operands(case)

    def derivatives(lhs, rhs):
        return [jax.jvp(conv, (lhs, rhs), (lhs[:, ::-1], rhs[::-1])) for conv in both(case)]

    assert_close(*jax.jit(derivatives)(lhs, rhs))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["maps", "kernels", "both"])
@every_kind
def test_vmap_over_either_operand_equals_xlas(name, axes):
    arrays = [
        np.stack([a, a[::-1] - 1]) if axis == 0 else a for a, axis in zip(operands(CASES[name]), axes, strict=True)
    ]

    def mapped(conv, *arrays):
        def loss(lhs, rhs):
            out = conv(lhs, rhs)
            return jnp.sum(jnp.square(out)), out

        return jax.vmap(jax.grad(loss, (0, 1), has_aux=True), axes)(*arrays)

    assert_close(*jax.jit(lambda *arrays: [mapped(conv, *arrays) for conv in both(CASES[name])])(*arrays))


PASSED_ON = {
    "dilated kernel": ((2, 6, 6, 4), (3, 3, 1, 4), {"rhs_dilation": (2, 1), "feature_group_count": 4}),
    "dilated map": ((2, 2, 2, 4), (3, 3, 4, 4), {"lhs_dilation": (2, 2)}),
    "negative padding": ((2, 6, 6, 4), (3, 3, 1, 4), {"padding": ((-1, 1), (0, -2)), "feature_group_count": 4}),
    "channels first": ((2, 4, 5, 5), (4, 1, 3, 3), {"dimension_numbers": None, "feature_group_count": 4}),
    "kernels as OIHW": ((2, 1, 1, 4), (4, 4, 3, 3), {"dimension_numbers": ("NHWC", "OIHW", "NHWC")}),
    "channels first afterwards": ((2, 1, 1, 4), (3, 3, 4, 4), {"dimension_numbers": ("NHWC", "HWIO", "NCHW")}),
    "groups of the batch": ((4, 2, 2, 4), (3, 3, 4, 4), {"batch_group_count": 2}),
    "one dimension": (
        (2, 4, 4),
        (3, 1, 4),
        {
            "window_strides": (1,),
            "padding": ((1, 1),),
            "dimension_numbers": ("NWC", "WIO", "NWC"),
            "feature_group_count": 4,
        },
    ),
    "three dimensions": (
        (1, 2, 2, 2, 4),
        (1, 1, 1, 4, 4),
        {"window_strides": (1, 1, 1), "padding": ((0, 0),) * 3, "dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},
    ),
}


@pytest.mark.parametrize(("maps", "kernel", "options"), PASSED_ON.values(), ids=PASSED_ON)
def test_what_is_dilated_or_not_plain_nhwc_is_passed_on(maps, kernel, options):
    lhs, rhs = normals(maps, 0), normals(kernel, 1)
    case = (maps, kernel, (1, 1), ((1, 1), (1, 1)), 1)
    ours, xlas = both(case, **options)
    assert str(jax.make_jaxpr(ours)(lhs, rhs)) == str(jax.make_jaxpr(xlas)(lhs, rhs))
    assert_close(*compared(case, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": lax.Precision.HIGHEST}, {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}, {"padding": "same"}],
    ids=["none", "precision", "dilation by 1", "lower case"],
)
@every_kind
def test_options_that_do_not_change_values_are_accepted(name, options):
    ours, xlas = both(CASES[name], **options)
    assert_close(*jax.jit(lambda *arrays: [ours(*arrays), xlas(*arrays)])(*operands(CASES[name])))


def test_a_result_of_another_dtype_equals_xlas():
    lhs, rhs = operands(CASES["few pixels"], jnp.bfloat16)
    ours, xlas = both(CASES["few pixels"], preferred_element_type=jnp.float32)
    assert ours(lhs, rhs).dtype == jnp.float32
    np.testing.assert_array_equal(ours(lhs, rhs), xlas(lhs, rhs))


def test_operands_that_do_not_fit_are_refused():
    for conv in both(CASES["few pixels"]):
        with pytest.raises((TypeError, ValueError)):
            conv(normals((1, 2, 2, 3), 0), normals((3, 3, 4, 5), 0))


@pytest.mark.parametrize(
    "options",
    [
        {"features": 8, "kernel_size": (3, 3), "feature_group_count": 8},
        {"features": 6, "kernel_size": (1, 1), "strides": 2},
        {"features": 6, "kernel_size": (3, 3), "strides": (2, 2), "padding": 1},
    ],
    ids=["depthwise", "1x1", "few pixels"],
)
def test_a_flax_layer_can_use_it(options):
    x = normals((2, 4, 4, 8), 0)
    ours, flaxs = nn.Conv(**options, conv_general_dilated=conv_general_dilated), nn.Conv(**options)
    variables = random_like(jax.eval_shape(flaxs.init, jax.random.key(0), x))
    assert_close(*jax.jit(lambda *given: [ours.apply(*given), flaxs.apply(*given)])(variables, x))


EXPORTED = {
    "depthwise": ((3, 3, 1, 8), 8, "SAME"),
    "1x1": ((1, 1, 8, 6), 1, "VALID"),
    "few pixels": ((3, 3, 8, 6), 1, "VALID"),
    "many pixels": ((3, 3, 8, 6), 1, "SAME"),
    "grouped": ((3, 3, 4, 6), 2, "SAME"),
}


def exported(name, platforms, batch="b"):
    """A convolution of maps [batch, 4, 4, 8] with a fixed kernel, and XLA's."""
    kernel, groups, padding = EXPORTED[name]
    ours, xlas = both(((), kernel, (1, 1), padding, groups))
    rhs = normals(kernel, 1)
    maps = jax.ShapeDtypeStruct(export.symbolic_shape(f"{batch}, 4, 4, 8"), jnp.float32)
    return export.export(jax.jit(lambda lhs: ours(lhs, rhs)), platforms=platforms)(maps), lambda lhs: xlas(lhs, rhs)


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_for_every_platform_takes_any_batch(name):
    ours, xlas = exported(name, ["cpu", "cuda", "tpu"])
    assert ours.platforms == ("cpu", "cuda", "tpu")
    for samples in (1, 3):
        lhs = normals((samples, 4, 4, 8), samples)
        assert_close(ours.call(lhs), xlas(lhs))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", EXPORTED)
def test_gpu_and_tpu_get_only_xlas_convolution(name, platform):
    text = exported(name, [platform])[0].mlir_module()
    assert text.count("stablehlo.convolution") == 1
    for other in ("stablehlo.slice", "stablehlo.pad", "stablehlo.dot_general", "optimization_barrier"):
        assert other not in text


# 8 images have 128 output pixels where the map keeps its size.
@pytest.mark.parametrize("batch", ["8", "b"])
@pytest.mark.parametrize(
    ("name", "convolutions"), [("depthwise", 0), ("1x1", 0), ("few pixels", 0), ("many pixels", 1), ("grouped", 1)]
)
def test_a_cpu_gets_a_convolution_only_where_xlas_is_fast(name, convolutions, batch):
    assert exported(name, ["cpu"], batch)[0].mlir_module().count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_gpu_and_tpu_get_only_xlas_gradients(platform):
    kernel = normals((3, 3, 1, 8), 1)
    ours, xlas = both(CASES["depthwise"])
    texts = []
    for conv in (ours, xlas):

        def loss(lhs, rhs, conv=conv):
            return jnp.sum(jnp.square(conv(lhs, rhs)))

        gradients = jax.jit(jax.grad(loss, (0, 1)))
        texts.append(export.export(gradients, platforms=[platform])(normals((2, 4, 4, 8), 0), kernel).mlir_module())
    for operation in ("stablehlo.convolution", "stablehlo.slice", "stablehlo.pad", "stablehlo.dot_general"):
        assert texts[0].count(operation) == texts[1].count(operation)
    assert "optimization_barrier" not in texts[0]


# Map, kernel, strides, padding, groups: channels that fill vectors and that do not, every edge, and a batch in parts.
TRAINED = {
    "depthwise": ((40, 6, 6, 32), (3, 3, 1, 32), (1, 1), ((1, 1), (1, 1)), 32),
    "depthwise, strides": ((3, 7, 6, 24), (3, 3, 1, 24), (2, 2), ((1, 1), (1, 1)), 24),
    "depthwise, unequal sides": ((2, 5, 9, 13), (3, 3, 1, 13), (2, 1), ((0, 2), (3, 1)), 13),
    "depthwise, one pixel": ((2, 1, 1, 5), (3, 3, 1, 5), (1, 1), ((1, 1), (1, 1)), 5),
    "ordinary": ((40, 16, 16, 16), (3, 3, 16, 32), (1, 1), ((1, 1), (1, 1)), 1),
    "three colours": ((5, 20, 20, 3), (7, 7, 3, 24), (2, 2), ((3, 3), (3, 3)), 1),
    "unequal sides": ((2, 5, 9, 13), (2, 3, 13, 45), (2, 1), ((0, 2), (3, 1)), 1),
    "more padding than map": ((2, 2, 1, 7), (5, 3, 7, 9), (1, 2), ((4, 3), (2, 6)), 1),
}


@pytest.fixture
def trained(request):
    """The convolution for training of a case, XLA's, and operands of both with a cotangent."""
    if not native.available():
        pytest.skip("no C++ compiler")
    case = TRAINED[request.param]
    _, xlas = both(case)
    ours = functools.partial(training_convolution, *xlas.args, **xlas.keywords)
    lhs, rhs = operands(case)
    return ours, xlas, lhs, rhs, normals(jax.eval_shape(xlas, lhs, rhs).shape, 2)


@pytest.mark.parametrize("trained", TRAINED, indirect=True)
def test_values_and_gradients_in_training_equal_xlas_up_to_rounding(trained):
    ours, xlas, *arrays = trained
    compare = jax.jit(lambda *arrays: [value_and_gradients(conv, *arrays) for conv in (ours, xlas)])
    assert_close(*compare(*arrays), 4e-6)


@pytest.mark.parametrize("trained", ["depthwise", "ordinary"], indirect=True)
def test_in_training_a_gradient_is_the_same_every_time_and_in_a_scan(trained):
    ours, _, lhs, rhs, cotangent = trained

    def gradient(lhs, rhs, cotangent):
        return value_and_gradients(ours, lhs, rhs, cotangent)[2]

    first, again = (jax.jit(gradient)(lhs, rhs, cotangent) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    _, scanned = lax.scan(lambda carry, x: (carry, gradient(x, rhs, cotangent)), 0, jnp.stack([lhs, lhs]))
    np.testing.assert_array_equal(scanned, jnp.stack([first, first]))


@pytest.mark.parametrize("why", [None, "no compiler", "bfloat16", "several devices"])
@pytest.mark.parametrize("trained", ["depthwise, strides", "ordinary"], indirect=True)
def test_in_training_xla_does_what_the_kernels_cannot(trained, why, monkeypatch):
    ours, _, *arrays = trained
    if why == "no compiler":
        monkeypatch.setattr(native, "available", lambda: False)
    if why == "bfloat16":
        arrays = [x.astype(jnp.bfloat16) for x in arrays]
    mesh = jax.sharding.AbstractMesh((2 if why == "several devices" else 1,), ("data",))
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(functools.partial(value_and_gradients, ours))(*arrays))
    assert ("ffi_call" in text) == (why is None)


@pytest.mark.parametrize("kernel", [(3, 3, 8, 6), (3, 3, 8, 7), (3, 3, 1, 8), (2, 3, 1, 7)], ids=str)
def test_a_kernel_refuses_shapes_that_do_not_fit(kernel):
    if not native.available():
        pytest.skip("no C++ compiler")
    x, cotangent = jnp.zeros((2, 4, 4, 8)), jnp.zeros((3 if kernel[3] == 7 else 2, 4, 4, 7))
    with pytest.raises(Exception, match="do not fit each other"):
        jax.block_until_ready(native.weight_gradient(x, cotangent, kernel, (1, 1), ((1, 1), (1, 1))))
