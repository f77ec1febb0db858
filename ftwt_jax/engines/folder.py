"""A folder of a router and the subnets between which it chooses, which `launch/run_onnx.py` runs."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ftwt_jax.errors import UserError
from ftwt_jax.files import folder_written_whole
from ftwt_jax.version import __version__

MANIFEST = "manifest.json"
# What a description says.
KEYS = ("model", "image", "classes", "dense_macs", "router_macs", "subnet_macs")


def write_folder(folder: pathlib.Path, files: Mapping[str, bytes], description: Mapping[str, Any]) -> pathlib.Path:
    """Writes a router, its subnets and `manifest.json`; all of them or nothing.

    The manifest holds "version" (of this package), "model", "image" ({"shape": [H, W, C], "dtype"}), "classes" (names,
    or null), "router" and "one_image" (their files), "subnets" (a list of {"file", "macs"}), "dense_macs" and
    "router_macs".

    Args:
      folder: must not be there yet; the one that it lies in must.
      files: by name, the contents of the router's file, of each subnet's, and of that of all in one, for one image.
        The router turns images into logits [N, K], the largest of which says which subnet an image takes; a subnet
        turns them into logits [N, classes].
      description: the manifest's "model", "image", "classes", "dense_macs" and "router_macs", and "subnet_macs", the
        MACs of each subnet.

    Returns:
      The folder.

    Raises:
      UserError: the description does not fit, the folder exists, or it cannot be written.
    """
    if set(description) != set(KEYS):
        raise UserError(f"a folder of subnets is described by {', '.join(KEYS)}; got {', '.join(sorted(description))}")
    macs, (router, *subnets, one_image) = description["subnet_macs"], files
    if not subnets or len(macs) != len(subnets):
        raise UserError(f"a folder holds one subnet or more, each with its MACs; got {len(subnets)}, {len(macs)}")
    manifest = {
        "version": __version__,
        **{name: value for name, value in description.items() if name != "subnet_macs"},
        "router": router,
        "one_image": one_image,
        "subnets": [{"file": file, "macs": int(count)} for file, count in zip(subnets, macs, strict=True)],
    }
    if folder.exists():
        raise UserError(f"{folder} already exists: name another folder, or remove it")
    with folder_written_whole(folder) as temporary:
        for file, contents in files.items():
            (temporary / file).write_bytes(contents)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return folder
