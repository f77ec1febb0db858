"""Files of weights. They may come from strangers: no code in them is ever run."""

import json
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ftwt_jax.errors import UserError, one_line, os_reason
from ftwt_jax.files import AnyPath, local_copy, written_whole

SAFETENSORS = ".safetensors"
# How files of `torch.save` begin, today's and those before version 1.6.
_ZIP, _PICKLE = b"PK", b"\x80"
# Metadata key under which our exports describe their network.
OWN = "ftwt_jax"


def read_checkpoint(path: AnyPath) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Reads a checkpoint: `.safetensors`, or any file of `torch.save`.

    Returns:
      Names to arrays, perhaps nested in other things if it is a PyTorch file; and the metadata of a safetensors file.

    Raises:
      UserError: the file is missing, broken or holds code, or it needs PyTorch, which is not installed.
    """
    if not path.is_file():
        what = "is a folder: name the file in it" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}")
    with local_copy(path) as copy:
        if copy.stat().st_size == 0:
            raise UserError(f"checkpoint {path} is empty: download or save it again")
        return _read_safetensors(path, copy) if path.suffix == SAFETENSORS else (_read_torch(path, copy), {})


def own_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """What one of our exports says about its network; empty for other files."""
    try:
        found = json.loads(metadata.get(OWN, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"its metadata {OWN!r} is not valid JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"its metadata {OWN!r} is not a JSON object")
    return found


def _read_safetensors(path: AnyPath, copy: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(copy, framework="numpy") as file:
            names = file.keys()  # The file itself is not iterable.
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = os_reason(error)
        raise UserError(
            f"checkpoint {path} is not a complete safetensors file ({reason}): download or save it again"
        ) from None
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {path} has a dtype that NumPy does not have, {one_line(error)}: save it as float32 or bfloat16"
        ) from None


def _read_torch(path: AnyPath, copy: pathlib.Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"reading {path.name} needs PyTorch (a {SAFETENSORS} file does not): pip install -e '.[convert]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About old formats, and archives that are refused below.
            found = torch.load(copy, map_location="cpu", weights_only=True)
    except Exception as error:
        # Broken files raise all kinds of errors: KeyError, EOFError, RuntimeError, ...
        named = re.search(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)", str(error))
        if named:
            raise UserError(
                f"checkpoint {path} is refused: it contains a {named[1]} object, not only tensors; loading it could "
                "run code; save only the state_dict, as safetensors or with torch.save(model.state_dict(), FILE)"
            ) from None
        reason = one_line(error).split(". ")[0]
        raise UserError(f"checkpoint {path} is {_broken(copy)}; torch.load(weights_only=True) says: {reason}") from None
    if not isinstance(found, Mapping):
        raise UserError(f"checkpoint {path} contains a {type(found).__name__}: save a state_dict, names to tensors")
    return found


def _broken(copy: pathlib.Path) -> str:
    """What is wrong with a file that PyTorch cannot load, and the remedy."""
    with copy.open("rb") as file:
        start = file.read(4)
    if start.startswith(_ZIP) and not zipfile.is_zipfile(copy):
        return "cut off: download or save it again"
    if start.startswith(_ZIP):
        with zipfile.ZipFile(copy) as archive:
            names = archive.namelist()
            if any("/code/" in name for name in names):
                return "a program: save its weights, torch.save(model.state_dict(), FILE)"
            if any(name.endswith("data.pkl") for name in names):
                return "damaged: download or save it again"
    elif start.startswith(_PICKLE):
        return "damaged, or holds more than tensors: save it again, torch.save(model.state_dict(), FILE)"
    return "no file of torch.save: name one, or a .safetensors file"


def write_safetensors(path: AnyPath, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes arrays by name; the file appears whole or not at all. Raises `UserError` if it cannot be written."""
    # `save` writes the memory of an array as it lies, in whatever order its axes are.
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with written_whole(path) as temporary:
        temporary.write_bytes(save(ordered, metadata={"format": "pt", **metadata}))
