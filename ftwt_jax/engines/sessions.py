"""ONNX networks run by an engine: images in, logits out."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ftwt_jax.engines.packages import imported
from ftwt_jax.errors import UserError, one_line, unknown_name

ENGINES = ("onnxruntime", "openvino", "torch")
# What each computes in; OpenVINO's bfloat16 is fast where the processor has instructions for it.
DTYPES = {"onnxruntime": ("float32",), "openvino": ("float32", "bfloat16"), "torch": ("float32",)}
# Our extras that install them.
EXTRAS = {"onnxruntime": "bench", "openvino": "bench", "torch": "convert"}
Session = Callable[[np.ndarray], np.ndarray]


def check_engine(engine: str, what: str) -> None:
    """Raises `UserError` if what an engine needs for our graphs is not installed.

    Args:
      what: what asks for the engine, for the message.
    """
    for package, extra in ((engine, EXTRAS[engine]), ("onnx", "onnx")):
        imported(package, what, extra)


def open_session(
    engine: str, model: Any, threads: int, dtype: str = "float32", alone: bool = True, any_number: bool = False
) -> Session:
    """An ONNX network, made ready on the CPU.

    Args:
      engine: "onnxruntime", "openvino", or "torch", PyTorch run eagerly, which knows networks of `onnx_model` alone.
      model: an `onnx.ModelProto`, or the path of a file.
      threads: cores that one call uses.
      dtype: what the engine computes in, one of `DTYPES[engine]`.
      alone: whether no other session runs in turns with this one. ONNX Runtime's threads go on spinning for a while
        after a call, and would take the cores from the next session: VGG-16's router and four subnets took 13 ms that
        way, 2.8 without.
      any_number: whether N will be another one each time. For OpenVINO, images are then repeated up to one of few N,
        1, 2, 3, 4, 6, 8, 12, 16, ... A network of any N is slow there when N changes from call to call.

    Returns:
      A function of images [N, H, W, C], of the model's dtype, to logits float32 [N, classes]. OpenVINO compiles the
      network when it meets an N that it has none for, which takes up to seconds. Not for several threads at once.

    Raises:
      UserError: the engine is unknown or not installed, does not compute in that dtype, or refuses the network; an
        `UnknownOperatorError` where that is for want of an operator.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if dtype not in DTYPES[engine]:
        raise UserError(f"{engine} computes in {' or '.join(DTYPES[engine])} here; got {dtype!r}")
    if threads < 1:
        raise UserError(f"an engine needs 1 thread or more; got {threads}")
    package = imported(engine, f"the engine {engine}", EXTRAS[engine])
    source = os.fspath(model) if isinstance(model, (str, os.PathLike)) else model.SerializeToString()
    try:
        if engine == "onnxruntime":
            return _open_onnxruntime(package, source, threads, alone)
        if engine == "openvino":
            return _open_openvino(package, source, threads, dtype, any_number)
        imported("onnx", f"the engine {engine}", "onnx")
        from ftwt_jax.engines.torch_session import open_torch

        return open_torch(source, threads)
    except UserError:
        raise
    except Exception as error:
        # Each engine has errors of its own, most of them bare RuntimeErrors.
        what = source if isinstance(source, str) else "the network"
        raise UserError(f"{engine} cannot run {what}: {one_line(error)}") from error


def _open_onnxruntime(onnxruntime: Any, source: str | bytes, threads: int, alone: bool) -> Session:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {given.name: images})[0]

    return run


def _open_openvino(openvino: Any, source: str | bytes, threads: int, dtype: str, any_number: bool) -> Session:
    core = openvino.Core()
    model = core.read_model(source)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
    }
    requests: dict[tuple[int, ...], Any] = {}

    def run(images: np.ndarray) -> np.ndarray:
        count = len(images)
        if any_number and rounded_up(count) > count:
            images = np.resize(images, (rounded_up(count), *images.shape[1:]))
        # A network of known shapes is faster than one of any.
        if images.shape not in requests:
            fixed = model.clone()
            fixed.reshape(list(images.shape))
            requests[images.shape] = core.compile_model(fixed, "CPU", settings).create_infer_request()
        request = requests[images.shape]
        request.infer([images], share_inputs=True)
        return request.get_output_tensor(0).data[:count].copy()

    return run


def rounded_up(count: int) -> int:
    """The next power of two, or three quarters of it."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power
