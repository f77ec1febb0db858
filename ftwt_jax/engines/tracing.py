"""A JAX function as ONNX nodes: traced, what does not depend on its images computed, the rest translated."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from ftwt_jax.engines.nodes import Graph, NoOperatorError, Size, Tensor, stored_dtype
from ftwt_jax.errors import UserError, one_line

# The name of the open axis.
OPEN = "N"
REMEDY = "write a program for JAX with --format=stablehlo"
# Calls of a part of a program, which is translated where it is called.
_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    *("checkpoint", "remat", "remat2", "custom_lin"),
}

Value = Tensor | np.ndarray
Rule = Callable[..., Value | list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers how primitives of these names are translated: `(translation, equation, *values)` to their values."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def traced(function: Callable, images: jax.ShapeDtypeStruct) -> Any:
    """The program of a function of any number of images.

    Raises:
      UserError: it does something that depends on how many images there are.
    """
    # How `CompactNetwork` computes images again depends on their number: this says that it may be all of them.
    rules = ((), (f"-1*floordiv(-1*{OPEN}, 8) >= {OPEN}",))
    for last, constraints in enumerate(rules):
        (size,) = export.symbolic_shape(OPEN, constraints=constraints)
        try:
            return jax.make_jaxpr(function)(jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype))
        except jax.errors.InconclusiveDimensionOperation as error:
            if last:
                raise UserError(
                    f"this network cannot be written for any number of images ({one_line(error)}): {REMEDY}"
                ) from error
    raise AssertionError


def sizes(shape: Sequence[Any]) -> tuple[Size, ...]:
    """A shape of a program, its open sizes as text."""
    return tuple(int(size) if isinstance(size, (int, np.integer)) else str(size) for size in shape)


def _closed(value: Any) -> Any:
    """A parameter of a primitive, with one image in place of any number."""
    if isinstance(value, (tuple, list)):
        made = [_closed(one) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if not export.is_symbolic_dim(value):
        return value
    if str(value) != OPEN:
        raise NoOperatorError("a constant has a size that depends on the number of images")
    return 1


@dataclasses.dataclass
class Translation:
    """A program on its way to a graph.

    Attributes:
      graph: what has been made of it.
      sums: of sums over windows or axes, by name: how many numbers each adds up, and what is needed to pool instead.
    """

    graph: Graph
    sums: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, program: Any, constants: Sequence[Any], values: Sequence[Value], place: str = "") -> list[Value]:
        """The results of a program; those that nothing needs are left out of branches."""
        found: dict[Any, Any] = {}
        found.update(zip(program.constvars, map(_host, constants), strict=True))
        found.update(zip(program.invars, values, strict=True))

        def read(atom: Any) -> Value:
            return np.asarray(atom.val) if hasattr(atom, "val") else found[atom]

        for equation, used in _needed(program):
            layer = "/".join(filter(None, (place, str(equation.source_info.name_stack))))
            self.graph.label = layer
            try:
                made = self._equation(equation, [read(atom) for atom in equation.invars], used, layer)
            except (NoOperatorError, NotImplementedError) as error:  # The latter is JAX's.
                what = f" of {layer}" if layer else ""
                reason = f": {one_line(error)}" if str(error) else ""
                name = equation.primitive.name
                raise UserError(f"{name}{what} cannot be written as ONNX{reason}; {REMEDY}") from error
            found.update(zip(equation.outvars, made, strict=True))
        return [read(atom) for atom in program.outvars]

    def _equation(self, equation: Any, values: list[Value], used: list[bool], layer: str) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            return [np.int32(next(i for i, platforms in enumerate(params["platforms"]) if platforms is None))]
        if name == "cond":
            index, *rest = values
            if isinstance(index, Tensor):
                return self._choice(index, params["branches"], rest, used, layer)
            branch = params["branches"][int(np.clip(index, 0, len(params["branches"]) - 1))]
            return self.run(branch.jaxpr, branch.consts, rest, layer)
        if name in _CALLS:
            called = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
            # With its constants or without.
            program, constants = (called.jaxpr, called.consts) if hasattr(called, "consts") else (called, ())
            return self.run(program, constants, values, layer)
        if not any(isinstance(value, Tensor) for value in values):
            return self._computed(equation, values)
        if name not in RULES:
            raise NoOperatorError("no ONNX operator is known for it")
        made = RULES[name](self, equation, *values)
        return made if isinstance(made, list) else [made]

    def _computed(self, equation: Any, values: list[Any]) -> Sequence[np.ndarray]:
        """What does not depend on the images. Of an array that is repeated for each image, one is held."""
        params = {name: _closed(value) for name, value in equation.params.items()}
        name = equation.primitive.name
        # JAX would compile a program for each shape of these.
        if name in ("reshape", "squeeze", "broadcast_in_dim"):
            shape = _closed(equation.outvars[0].aval.shape)
            array = np.asarray(values[0])
            if name == "broadcast_in_dim":
                places = params["broadcast_dimensions"]
                array = array.reshape(
                    [1 if at not in places else array.shape[places.index(at)] for at in range(len(shape))]
                )
            return [np.broadcast_to(array, shape) if name == "broadcast_in_dim" else array.reshape(shape)]
        with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"):
            made = equation.primitive.bind(*map(jnp.asarray, values), **params)
        return list(map(np.asarray, made if equation.primitive.multiple_results else [made]))

    def _choice(
        self, index: Tensor, branches: Sequence[Any], values: list[Value], used: list[bool], layer: str
    ) -> list[Any]:
        """The results of the branch that an index chooses: an If, or one in another."""
        here = self.graph

        def results(branches: Sequence[Any], index: Tensor) -> tuple[Graph, list[Tensor]]:
            inner = Translation(Graph(here), self.sums)
            if len(branches) == 1:
                made = inner.run(branches[0].jaxpr, branches[0].consts, values, layer)
                made = [one for one, needed in zip(made, used, strict=True) if needed]
                avals = [a for a, needed in zip(branches[0].out_avals, used, strict=True) if needed]
                return inner.graph, [inner.plain(one, aval) for one, aval in zip(made, avals, strict=True)]
            chosen = inner.graph.op("Equal", index.name, inner.graph.constant(np.int32(0)))
            rest = dataclasses.replace(index, name=inner.graph.op("Sub", index.name, inner.graph.constant(np.int32(1))))
            first, others = results(branches[:1], index), results(branches[1:], rest)
            node = inner.graph.node(
                "If",
                chosen,
                outputs=sum(used),
                then_branch=(first[0], tuple(one.name for one in first[1])),
                else_branch=(others[0], tuple(one.name for one in others[1])),
            )
            return inner.graph, [
                dataclasses.replace(one, name=name) for one, name in zip(first[1], node.outputs, strict=True)
            ]

        graph, made = results(branches, index)
        here.nodes += graph.nodes
        left = iter(made)
        return [next(left) if needed else None for needed in used]

    # What rules need.

    def plain(self, value: Value, aval: Any) -> Tensor:
        """A result as the function sees it, nothing left to broadcast, by a node of this very graph."""
        shape = sizes(aval.shape)
        if isinstance(value, Tensor):
            moved = self.graph.full(self.graph.stored_as(value, range(len(shape))))
            return dataclasses.replace(moved, name=self.graph.op("Identity", moved.name))
        if any(isinstance(size, str) for size in shape):
            raise NoOperatorError("a branch returns what does not depend on the images")
        array = stored_dtype(np.broadcast_to(value, aval.shape))
        name = self.graph.op("Identity", self.graph.constant(array))
        return Tensor(name, shape, tuple(range(len(shape))), shape, array.dtype)

    def tensor(self, value: Value, like: Tensor) -> Tensor:
        """A value as a tensor that is stored in the order of another."""
        if isinstance(value, Tensor):
            return self.graph.stored_as(value, like.order)
        array = stored_dtype(value)
        name = self.graph.constant(array.transpose(like.order))
        return Tensor(name, array.shape, like.order, array.shape, array.dtype)

    def elementwise(self, kind: str, equation: Any, *values: Value | np.generic, dtype: Any = None) -> Tensor:
        """A node of this kind for arrays that broadcast to the equation's result."""
        shape = sizes(equation.outvars[0].aval.shape)
        tensors = [value for value in values if isinstance(value, Tensor) and value.shape]
        # The one that holds the most decides in which order axes are stored.
        most = max(tensors, key=lambda x: sum(size != 1 for size in x.held), default=None)
        order = () if most is None else most.order
        held = [1] * len(shape) if most is None else list(most.held)
        aligned = [self.graph.stored_as(x, order) if isinstance(x, Tensor) and x.shape else x for x in values]
        for x in aligned:
            if isinstance(x, Tensor) and x.shape:
                held = [a if b == 1 else b for a, b in zip(held, x.held, strict=True)]
        names = []
        for x in aligned:
            if not isinstance(x, Tensor):
                array = _shrunk(np.asarray(x), held)
                if array.ndim:
                    held = [a if b == 1 else b for a, b in zip(held, array.shape, strict=True)]
                    array = array.reshape(()) if array.size == 1 else array.transpose(order)
                names.append(self.graph.constant(array))
            else:
                names.append(x.name)
        found = self.dtype(equation) if dtype is None else np.dtype(dtype)
        return Tensor(self.graph.op(kind, *names), shape, order, tuple(held), found)

    def dtype(self, equation: Any) -> np.dtype:
        """The type of an equation's result as it is stored."""
        return stored_dtype(np.zeros((), equation.outvars[0].aval.dtype)).dtype

    def unary(self, x: Tensor, kind: str, *more: str, dtype: Any = None, **attributes: Any) -> Tensor:
        """The array after a function of each of its numbers."""
        name = self.graph.op(kind, x.name, *more, **attributes)
        return dataclasses.replace(x, name=name, dtype=x.dtype if dtype is None else np.dtype(dtype))

    def without(self, x: Tensor, name: str, axes: Sequence[int], shape: tuple[Size, ...], dtype: Any = None) -> Tensor:
        """What is left of an array by a reduction over these axes."""
        kept = [axis for axis in range(len(x.shape)) if axis not in axes]
        order = tuple(kept.index(axis) for axis in x.order if axis in kept)
        held = tuple(x.held[axis] for axis in kept)
        return Tensor(name, shape, order, held, x.dtype if dtype is None else np.dtype(dtype))


def _host(value: Any) -> np.ndarray:
    return np.asarray(value)


def _shrunk(array: np.ndarray, held: Sequence[Size]) -> np.ndarray:
    """Without repetitions along the axes that another operand has at full length."""
    for axis in range(array.ndim):
        if array.shape[axis] > 1 and held[axis] == array.shape[axis]:
            first = array.take([0], axis)
            if np.all(array == first):
                array = first
    return array


def _needed(program: Any) -> list[tuple[Any, list[bool]]]:
    """The equations that its results need, and which of their own results are needed."""
    needed = {atom for atom in program.outvars if not hasattr(atom, "val")}
    found = []
    for equation in reversed(program.eqns):
        used = [one in needed for one in equation.outvars]
        if any(used):
            found.append((equation, used))
            needed |= {atom for atom in equation.invars if not hasattr(atom, "val")}
    return found[::-1]
