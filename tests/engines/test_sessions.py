"""Engines, and folders of subnets that a script without JAX runs."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ftwt_jax.engines.folder import write_folder
from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.engines.sessions import open_session
from ftwt_jax.errors import UserError
from ftwt_jax.inference.compact import fold
from ftwt_jax.models import create_model
from tests.conftest import ROOT, random_like

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLASSES = ("ant", "bee", "cat", "dog")
IMAGES = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.uint8)


def subnet(index: int):
    """Logits as a function of images uint8, of a narrower network of its own."""
    model = create_model("vgg_bn", len(CLASSES), plan=(6 + index, "M", 8 - index))
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3))), seed=index)
    network = fold(model, variables)
    return lambda images: network(images.astype(jnp.float32) / 128 - 1).logits


def route(images):
    """By the brightest colour."""
    return 10 * jnp.mean(images.astype(jnp.float32), axis=(1, 2)) / 255


DESCRIPTION = {
    "model": "vgg_bn",
    "image": {"shape": [12, 12, 3], "dtype": "uint8"},
    "classes": list(CLASSES),
    "dense_macs": 4000,
    "router_macs": 10,
    "subnet_macs": [1000, 1100, 1200],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    functions = {"router": route, **{f"subnet{index}": subnet(index) for index in range(3)}, "one_image": subnet(0)}
    files = {f"{name}.onnx": onnx_model(fn, IMAGES, name).SerializeToString() for name, fn in functions.items()}
    return write_folder(tmp_path_factory.mktemp("written") / "subnets", files, DESCRIPTION)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images whose brightest colours are green, red, blue, red; of another size than the networks take."""
    place, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for index, colour in enumerate((1, 0, 2, 0)):
        pixels = rng.integers(0, 150, (20, 16, 3), np.uint8)
        pixels[..., colour] += 100
        paths.append(place / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def run_elsewhere(network, engine, files):
    script = "import sys; sys.modules['jax'] = sys.modules['ftwt_jax'] = None; import runpy; "
    script += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", script, ROOT / "launch" / "run_onnx.py", network, f"--engine={engine}", *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line.rsplit(" ", 3) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_script_routes_images_to_subnets(folder, files, engine):
    lines = run_elsewhere(folder, engine, files)
    assert [line[0] for line in lines] == list(map(str, files))
    assert [int(line[1]) for line in lines] == [1, 0, 2, 0]
    for file, chosen, name, share in lines:
        image = np.asarray(Image.open(file).convert("RGB").resize((12, 12)))[None]
        expected = jax.nn.softmax(subnet(int(chosen))(jnp.asarray(image))[0])
        assert name == CLASSES[int(np.argmax(expected))]
        assert float(share) == pytest.approx(float(np.max(expected)), abs=2e-3)


def test_a_script_runs_a_single_file(folder, files):
    lines = run_elsewhere(folder / "subnet1.onnx", "onnxruntime", files[:2])
    assert [line[1] for line in lines] == ["0", "0"]
    assert all(re.fullmatch(r"[0-3]", line[2]) for line in lines)


def test_the_script_is_short():
    assert len((ROOT / "launch" / "run_onnx.py").read_text().splitlines()) <= 40


def test_the_manifest_says_what_is_in_the_folder(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "router.onnx",
        "one_image.onnx",
        *(f"subnet{index}.onnx" for index in range(3)),
    }
    assert manifest["subnets"][1] == {"file": "subnet1.onnx", "macs": 1100}
    assert manifest["router"] == "router.onnx"
    assert set(manifest) == {
        *("version", "model", "image", "classes", "router", "one_image", "subnets", "dense_macs", "router_macs"),
    }


def test_a_folder_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    files = {"router.onnx": b"1", "subnet0.onnx": b"2", "one_image.onnx": b"3"}
    with pytest.raises(UserError, match="already exists"):
        write_folder(folder, files, {**DESCRIPTION, "subnet_macs": [1]})
    with pytest.raises(UserError, match="MACs"):
        write_folder(tmp_path / "new", files, DESCRIPTION)

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(UserError, match="no space left"):
        write_folder(tmp_path / "new", files, {**DESCRIPTION, "subnet_macs": [1]})
    assert not list(tmp_path.iterdir())


def test_an_engine_is_known_and_there(folder, monkeypatch):
    file = folder / "subnet0.onnx"
    with pytest.raises(UserError, match="did you mean 'openvino'"):
        open_session("openvine", file, 1)
    with pytest.raises(UserError, match="float32 here"):
        open_session("onnxruntime", file, 1, "bfloat16")
    with pytest.raises(UserError, match=r"cannot run .*manifest\.json"):
        open_session("onnxruntime", folder / "manifest.json", 1)
    images = np.zeros((2, 12, 12, 3), np.uint8)
    half, whole = (open_session("openvino", file, 1, dtype)(images) for dtype in ("bfloat16", "float32"))
    assert half.dtype == np.float32
    assert np.allclose(half, whole, rtol=0.05, atol=0.05)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"needs openvino: pip install -e '\.\[bench\]'"):
        open_session("openvino", file, 1)


def test_openvino_compiles_few_networks_for_groups_of_any_size(monkeypatch):
    openvino = pytest.importorskip("openvino")
    compiled, compile_model = [], openvino.Core.compile_model

    def counting(self, model, *arguments):
        compiled.append(model.input().shape[0])
        return compile_model(self, model, *arguments)

    monkeypatch.setattr(openvino.Core, "compile_model", counting)
    function = subnet(1)
    run = open_session("openvino", onnx_model(function, IMAGES, "subnet"), 1, any_number=True)
    images = np.random.default_rng(0).integers(0, 256, (32, 12, 12, 3), np.uint8)
    for count in (*range(1, 33), 5, 9, 1):
        expected = np.asarray(function(jnp.asarray(images[:count])))
        np.testing.assert_allclose(run(images[:count]), expected, atol=1e-4 * np.abs(expected).max())
    assert compiled == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
