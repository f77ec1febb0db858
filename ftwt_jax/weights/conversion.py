"""What our variables cannot hold of an imported state dict, kept so that it can be exported again bit for bit."""

import dataclasses
import json

import flax.linen as nn
import numpy as np

from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.weights.files import read_checkpoint, write_safetensors
from ftwt_jax.weights.names import is_head
from ftwt_jax.weights.source import Arrays
from ftwt_jax.weights.state import Imported, Variables, export_state, layout_called

FILE = "conversion.safetensors"
COUNTER, REST = "counter/", "rest/"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The names of an imported state dict, and the part of its values that our variables do not hold.

    Attributes:
      layout, gated: the layout of the names.
      prefix: common to all names.
      names: all names, without the prefix.
      counters: batch norm's counts of batches.
      rests: by name, what to add to the bits of a gate head's kernel. Import divides and export multiplies it, and both
        round.
    """

    layout: str
    gated: bool
    prefix: str
    names: tuple[str, ...]
    counters: Arrays
    rests: Arrays

    @property
    def holds_heads(self) -> bool:
        """Whether the state dict had gate heads."""
        return any(map(is_head, self.names))

    @classmethod
    def of(cls, imported: Imported) -> "Conversion":
        """What the variables of an import do not hold of its state dict."""
        source, layout = imported.source, imported.layout
        back = export_state(imported.model, imported.variables, layout)
        rests = {}
        for name, array in source.arrays.items():
            if name in back and array.shape == back[name].shape and not np.array_equal(array, back[name]):
                rest = _bits(array) - _bits(back[name])
                rests[name] = rest.astype(np.int8) if np.abs(rest).max() < 128 else rest
        return cls(layout.name, layout.gated, source.prefix, tuple(source.arrays), source.counters, rests)

    def restore(self, model: nn.Module, variables: Variables) -> Arrays:
        """The imported state dict, from the variables made from it."""
        exported = export_state(model, variables, layout_called(model, self.layout, self.gated))
        arrays = {name: exported[name] for name in self.names if name in exported}
        for name, rest in self.rests.items():
            if name in arrays and arrays[name].shape == rest.shape:
                arrays[name] = (_bits(arrays[name]) + rest.astype(np.int32)).view(np.float32)
        return {self.prefix + name: array for name, array in {**arrays, **self.counters}.items()}

    def save(self, folder: AnyPath) -> None:
        """Writes this record into a workdir."""
        arrays = {COUNTER + name: array for name, array in self.counters.items()}
        arrays |= {REST + name: array for name, array in self.rests.items()}
        facts = {"layout": self.layout, "gated": self.gated, "prefix": self.prefix, "names": self.names}
        write_safetensors(folder / FILE, arrays, {"conversion": json.dumps(facts)})

    @classmethod
    def load(cls, folder: AnyPath) -> "Conversion | None":
        """The record of a workdir; None if its network was not imported."""
        if not (folder / FILE).exists():
            return None
        arrays, metadata = read_checkpoint(folder / FILE)
        try:
            facts = json.loads(metadata["conversion"])
            names = tuple(facts["names"])
            parts = (
                {name.removeprefix(kind): array for name, array in arrays.items() if name.startswith(kind)}
                for kind in (COUNTER, REST)
            )
            return cls(facts["layout"], facts["gated"], facts["prefix"], names, *parts)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / FILE} is not a valid record of a conversion: {error!r}; delete it") from None


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32).view(np.int32)
