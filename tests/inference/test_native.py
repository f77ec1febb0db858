"""The kernel for CPUs against XLA's own convolution, as it is built for this processor and for any."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import ftwt_jax as ftwt
from ftwt_jax.inference import native
from ftwt_jax.inference.native import kernels
from ftwt_jax.ops import native as ops_native
from tests.conftest import ROOT

pytestmark = pytest.mark.long

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
BUILDS = {"this processor": ops_native.TUNINGS, "any": ((),), "AVX2": (("-mavx2", "-mfma"),)}


@pytest.fixture(scope="module", params=BUILDS)
def built(request, tmp_path_factory):
    """The kernel built in one way, in use."""
    if not native.available():
        pytest.skip("no C++ compiler")
    if request.param == "AVX2" and "avx2" not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip("no such processor")
    folder = tmp_path_factory.mktemp("built")
    library = native.build(folder, BUILDS[request.param])
    assert native.build(folder, BUILDS[request.param]) == library
    assert list(folder.iterdir()) == [library]
    before, target = kernels.TARGET, f"test {request.param}"
    native.register(library, target)
    kernels.TARGET = target
    yield
    kernels.TARGET = before


def reference(x, shown, kernel, bias, head, kept, gates, groups, shortcut, relu, strides, pads, left_out):
    """In the order in which the paper has it: pool, head, convolution of everything, mask."""
    summary = x.max((1, 2)) if gates.pool == "max" else x.mean((1, 2))
    summary = np.concatenate([summary, np.zeros((len(x), left_out), np.float32)], axis=1)
    if gates.norm == "layer":
        summary = summary - summary.mean(1, keepdims=True)
        summary = summary / np.sqrt(np.square(summary).mean(1, keepdims=True) + 1e-5)
    if gates.norm == "softmax":
        powers = np.exp(summary - summary.max(1, keepdims=True))
        summary = powers / powers.sum(1, keepdims=True) * summary.shape[1]
    logits = summary @ head["kernel"] + head["bias"]
    y = lax.conv_general_dilated(
        shown, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip
    y = np.asarray(y) + bias + (0 if shortcut is None else shortcut)
    y = np.maximum(y, 0) if relu else y
    return np.where(logits[:, kept][:, None, None, :] > 0, y, 0), logits


def cases(draw, depthwise):
    window = draw(st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 2))
    pads = draw(st.tuples(*[st.tuples(*[st.integers(0, 2)] * 2)] * 2))
    channels = draw(st.sampled_from([1, 3, 16, 17, 40, 70]))
    return {
        "samples": draw(st.sampled_from([1, 1, 2, 3, 5])),
        "sides": tuple(max(draw(st.integers(1, 19)), size - sum(pad)) for size, pad in zip(window, pads, strict=True)),
        "window": window,
        "pads": pads,
        "channels": channels,
        "filters": channels if depthwise else draw(st.sampled_from([1, 5, 16, 32, 33, 64, 100, 130])),
        "strides": draw(st.tuples(*[st.sampled_from([1, 1, 2])] * 2)),
        "live": draw(st.sampled_from([0, 0.3, 1])),
        "on": draw(st.sampled_from([-9, -1, 0, 1, 9])),
        "relu": draw(st.booleans()),
        "shortcut": draw(st.booleans()),
        "left_out": draw(st.sampled_from([0, 0, 3])),
        "gates": draw(
            st.builds(
                ftwt.GateConfig,
                pool=st.sampled_from(["max", "mean"]),
                norm=st.sampled_from(["none", "softmax", "layer"]),
            )
        ),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.parametrize("depthwise", [False, True], ids=["convolution", "depthwise"])
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_unit_is_what_xla_computes(built, depthwise, data):
    case = cases(data.draw, depthwise)
    rng = np.random.default_rng(case["seed"])
    normal = functools.partial(rng.normal, size=None)
    samples, channels, filters = case["samples"], case["channels"], case["filters"]
    x = normal(size=(samples, *case["sides"], channels)).astype(np.float32)
    x *= (rng.random((samples, channels)) < case["live"])[:, None, None, :]
    inputs = 1 if depthwise else channels
    kernel = normal(size=(*case["window"], inputs, filters)).astype(np.float32)
    bias = normal(size=filters).astype(np.float32)
    # Some of the unit's filters are left out for good, and some of its input channels.
    own = depthwise and case["seed"] % 3 == 0
    all_filters = channels + case["left_out"] if own else filters + rng.integers(0, 3)
    kept = np.sort(rng.permutation(all_filters)[:filters]).astype(np.int32)
    head = {
        "kernel": normal(size=(channels + case["left_out"], all_filters)).astype(np.float32),
        "bias": (case["on"] + normal(size=all_filters)).astype(np.float32),
    }
    # A gate that reads its own channel alone: one number in each row, the rows in any order.
    place = rng.permutation(all_filters)[: channels if own else 0].astype(np.int32)
    if own:
        rest = np.setdiff1d(np.arange(all_filters), place)
        head["kernel"] *= np.eye(all_filters)[[*place, *rest]].astype(np.float32)
    height, width = (
        (side + sum(pad) - size) // step + 1
        for side, pad, size, step in zip(case["sides"], case["pads"], case["window"], case["strides"], strict=True)
    )
    shortcut = normal(size=(samples, height, width, filters)).astype(np.float32) if case["shortcut"] else None
    # A depthwise filter need not find its channel at its own place, or at all.
    source = rng.integers(-1, channels, channels) if case["seed"] % 2 else np.arange(channels)
    shown = np.where(source < 0, 0, x[..., source]) if depthwise else x
    weights = kernels.UnitWeights(
        kernel.reshape(-1, filters) if depthwise else kernels.blocked(kernel),
        bias,
        head["kernel"][np.arange(channels), place][:, None] if own else head["kernel"][:channels],
        head["kernel"].sum(0),
        head["bias"],
        place,
        kept,
        np.resize(source, filters).astype(np.int32),
    )
    gates, options = case["gates"], {"relu": case["relu"], "left_out": case["left_out"]}
    y, logits = jax.jit(
        lambda x, weights, shortcut: kernels.gated_unit(
            x, weights, case["window"], gates, case["strides"], case["pads"], shortcut, **options
        )
    )(x, jax.tree.map(jnp.asarray, weights), shortcut)
    wanted, wanted_logits = reference(
        x, shown, kernel, bias, head, kept, gates, filters if depthwise else 1,
        shortcut, case["relu"], case["strides"], case["pads"], case["left_out"],
    )  # fmt: skip
    largest = np.abs(wanted_logits).max()
    np.testing.assert_allclose(logits, wanted_logits, rtol=0, atol=2e-5 * largest)
    clear = (np.abs(wanted_logits[:, kept]) > 1e-4 * largest)[:, None, None, :]
    np.testing.assert_allclose(np.where(clear, y, 0), np.where(clear, wanted, 0), rtol=1e-4, atol=1e-4)
    assert np.all(np.asarray(y)[np.broadcast_to(np.asarray(logits)[:, kept][:, None, None, :] <= 0, y.shape)] == 0)


def test_without_a_compiler_compact_execution_does_without(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not native.available.__wrapped__()
    monkeypatch.setattr(native, "available", lambda: False)
    model = ftwt.create_model("vgg_bn", 5, plan=(8,), gates=ftwt.GateConfig.paper())
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 3)).astype(np.float32)
    compact = ftwt.compact(model, model.init(jax.random.key(0), images), images)
    assert not compact.execution.per_image


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(OSError, match="does not compile"):
        native.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def fuzz(library: pathlib.Path, calls: int, processes: int = 1, **environment: str) -> None:
    command = [sys.executable, "-m", "tests.helpers.fuzz_kernel", str(library), str(calls // processes)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*command, str(seed)], cwd=ROOT, env=os.environ | environment, **options)
        for seed in range(processes)
    ]
    try:
        for process in started:
            out, err = process.communicate(timeout=3000)
            assert process.returncode == 0, out[-2000:] + err[-6000:]
            answered, refused = map(int, re.findall(r"\d+", out.splitlines()[-1]))
            assert min(answered, refused) > calls / processes / 5
    finally:
        for process in started:
            process.kill()


@needs_compiler
def test_what_does_not_fit_is_refused(tmp_path):
    fuzz(native.build(tmp_path), 400)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("tuning", [(), ("-march=native",)], ids=["any", "this processor"])
def test_no_call_touches_memory_that_is_not_its_own(tmp_path, tuning):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, 10,000 calls in all."""
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    library = native.build(tmp_path, ((*checks, *tuning),))
    compiler = os.environ.get("CXX") or "c++"
    # JAX's own libraries throw exceptions, which AddressSanitizer follows only if libstdc++ is loaded before it.
    names = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    found = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    # JAX keeps what it allocates to the end.
    fuzz(library, 5000, 2, LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0", JAX_PLATFORMS="cpu")
