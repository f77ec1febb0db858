"""Runs exported ONNX networks: python launch/run_onnx.py DIR_OR_FILE.onnx --engine=onnxruntime|openvino IMAGE..."""

import argparse
import importlib
import json
import pathlib

import numpy as np
from PIL import Image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("network", type=pathlib.Path, help="a folder with manifest.json, or a file")
parser.add_argument("images", nargs="+", metavar="IMAGE")
parser.add_argument("--engine", choices=("onnxruntime", "openvino"), default="onnxruntime")
args = parser.parse_intermixed_args()
engine = importlib.import_module(args.engine)


def load(file):
    """The network as a function of images, the shape [H, W, C] of an image, and the engine's name of its dtype."""
    if args.engine == "onnxruntime":
        session = engine.InferenceSession(file, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0]
        return lambda x: session.run(None, {"images": x})[0], given.shape[1:], given.type
    network = engine.Core().compile_model(file, "CPU")
    shape = [side.get_length() for side in list(network.input().partial_shape)[1:]]
    return lambda x: network([x])[0], shape, str(network.input().element_type)


manifest = json.loads((args.network / "manifest.json").read_text()) if args.network.is_dir() else {}
subnets = [load(args.network / one["file"]) for one in manifest["subnets"]] if manifest else [load(args.network)]
(height, width, channels), dtype, names = *subnets[0][1:], manifest.get("classes")
opened = [Image.open(file).convert("L" if channels == 1 else "RGB").resize((width, height)) for file in args.images]
images = np.stack(opened).reshape(-1, height, width, channels).astype("uint8" if "uint8" in dtype else "float32")
chosen = load(args.network / manifest["router"])[0](images).argmax(1) if manifest else np.zeros(len(images), int)
logits = {subnet: subnets[subnet][0](images[chosen == subnet]) for subnet in np.unique(chosen)}
for index, (file, subnet) in enumerate(zip(args.images, chosen, strict=True)):
    scores = logits[subnet][np.sum(chosen[:index] == subnet)]
    shares, best = np.exp(scores - scores.max()), scores.argmax()
    print(file, subnet, names[best] if names else best, f"{1 / shares.sum():.3f}")
