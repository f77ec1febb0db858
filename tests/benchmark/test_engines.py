"""Networks timed in several engines side by side."""

import dataclasses
import io
import sys

import jax
import pytest
from rich.console import Console

from ftwt_jax.benchmark.engines import _everywhere, check_engines, narrower, network_macs, time_engines
from ftwt_jax.benchmark.subnets import synthetic_subnets
from ftwt_jax.benchmark.synthetic import random_gates, random_variables
from ftwt_jax.budget.trained import Subject, random_images
from ftwt_jax.engines import timing
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.inference.compact import fold
from ftwt_jax.models import create_model
from tests.conftest import fails

pytestmark = pytest.mark.usefixtures("quick_compilation")
PLAN = (32, "M", 48)


def test_each_engine_times_what_it_runs(monkeypatch):
    monkeypatch.setattr(timing, "_PAUSE_S", 0)
    images = random_images(48, (16, 16, 3), jax.random.key(0))
    dense = create_model("vgg_bn", 10, plan=PLAN)
    gated = create_model("vgg_bn", 10, plan=PLAN, gates=GateConfig())
    variables, reduction = random_gates(gated, random_variables(gated, images.shape[1:]), images[:32], 0.5)
    subject = Subject(
        "vgg_bn", "synthetic", dense, gated, variables, variables, images[:32], images[32:], lambda x: x / 128 - 1
    )
    printed = io.StringIO()
    subject = dataclasses.replace(subject, subnets=synthetic_subnets(subject, 0.4))
    engines = ("xla", "onnxruntime", "openvino", "torch")
    found = time_engines(subject, reduction, engines, Console(file=printed, width=200), batches=(1, 4), threads=1)
    assert all(one.keys() == {"network", "engine", "dtype", "batch", "ms", "macs"} for one in found)
    assert all(one["ms"] > 0 for one in found)
    everywhere = {*((engine, "float32") for engine in engines), ("openvino", "bfloat16")}
    expected = {(name, *key) for name in ("dense", "narrower", "masked", "subnets", "one subnet") for key in everywhere}
    expected |= {("compact", "xla", "float32")}
    one_image = {("subnets, one graph", *key) for key in everywhere if key[0] != "xla"}
    for batch, more in ((1, one_image), (4, set())):
        timed = {(one["network"], one["engine"], one["dtype"]) for one in found if one["batch"] == batch}
        assert timed == expected | more
    counts = {one["network"]: one["macs"] for one in found}
    assert counts["narrower"] == pytest.approx(counts["compact"], rel=0.05)
    assert counts["compact"] < counts["dense"] == counts["masked"]
    for word in ("narrower", "subnets", "openvino · bf16", "torch · f32", "ms at batch 4"):
        assert word in printed.getvalue()


def test_an_engine_that_lacks_an_operator_is_left_out(monkeypatch):
    torch_operators = pytest.importorskip("ftwt_jax.engines.torch_operators")
    model = create_model("vgg_bn", 10, plan=(8,), gates=GateConfig())
    network = fold(model, random_variables(model, (4, 4, 3)))
    engines = ("onnxruntime", "torch")
    assert [engine for engine, _ in _everywhere(network, (4, 4, 3), engines, 1)] == ["onnxruntime", "torch"]
    monkeypatch.delitem(torch_operators._ELEMENTWISE, "Where")
    assert [engine for engine, _ in _everywhere(network, (4, 4, 3), engines, 1)] == ["onnxruntime"]


@pytest.mark.parametrize("name", ["resnet56", "vgg16_bn", "mobilenet_v1"])
def test_a_narrower_network_has_the_macs_that_are_wanted(name):
    model = create_model(name, 10)
    wanted = 0.4 * network_macs(model, (32, 32, 3))
    assert network_macs(narrower(model, (32, 32, 3), wanted), (32, 32, 3)) == pytest.approx(wanted, rel=0.02)


def test_macs_of_a_dense_network_are_those_of_its_layers():
    model = create_model("vgg_bn", 10, plan=(4, "M", 8))
    assert network_macs(model, (8, 8, 3)) == 8 * 8 * 9 * 3 * 4 + 4 * 4 * 9 * 4 * 8 + 8 * 10


def test_engines_are_known_and_there(capsys, monkeypatch):
    arguments = ("benchmark", "--arch=resnet8", "--budget=0.4")
    assert "did you mean 'openvino'" in fails(capsys, *arguments, "--engines=xla,openvine")
    for engine, extra in (("onnxruntime", "bench"), ("torch", "convert")):
        monkeypatch.setitem(sys.modules, engine, None)
        remedy = f"--engines={engine} needs {engine}: pip install -e '.[{extra}]'"
        assert remedy in fails(capsys, *arguments, f"--engines={engine}")
    with pytest.raises(UserError, match="onnxruntime"):
        check_engines(["onnxruntime"])
