"""The subnets of a run as they are kept in its workdir."""

import json

import numpy as np

from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.parallel.processes import barrier, is_first
from ftwt_jax.subnets.find import Subnets
from ftwt_jax.weights.files import OWN, own_metadata, read_checkpoint, write_safetensors
from ftwt_jax.workdir import SUBNETS

_MASK = "masks/"


def write_subnets(folder: AnyPath, subnets: Subnets) -> None:
    """Writes the subnets from the first process alone; the others wait for it."""
    if is_first():
        arrays = {f"{_MASK}{name}": mask.astype(np.uint8) for name, mask in subnets.masks.items()}
        arrays |= {name: getattr(subnets, name) for name in ("macs", "centers", "weights")}
        arrays["assignment"] = subnets.assignment.astype(np.int32)
        about = {"dense_macs": subnets.dense_macs, "source": subnets.source}
        write_safetensors(folder / SUBNETS, arrays, {OWN: json.dumps(about)})
    barrier("subnets written")


def read_subnets(folder: AnyPath) -> Subnets:
    """Reads them; raises `UserError` if the file is missing or damaged."""
    path = folder / SUBNETS
    arrays, metadata = read_checkpoint(path)
    try:
        about = own_metadata(metadata)
        return Subnets(
            {
                name.removeprefix(_MASK): np.asarray(mask).astype(bool)
                for name, mask in arrays.items()
                if name.startswith(_MASK)
            },
            np.asarray(arrays["macs"]),
            float(about["dense_macs"]),
            np.asarray(arrays["assignment"]),
            np.asarray(arrays["centers"]),
            np.asarray(arrays["weights"]),
            str(about["source"]),
        )
    except (KeyError, TypeError, ValueError, UserError):
        raise UserError(f"{path} does not hold subnets: restore it, or train them in a new workdir") from None
