"""A network with its subnets and the router that chooses one for each image, as one Flax module."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError, listed
from ftwt_jax.gating.activations import Activations, Layers, as_activations
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.gating.macs import macs
from ftwt_jax.gating.naming import COLLECTIONS, LISTED
from ftwt_jax.gating.norms import BATCH_NORM
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs, Routes
from ftwt_jax.subnets.find import Subnets

# Name of the router among the parameters of a network.
ROUTER_NAME = "router"
# What a router may cost, as a share of the dense network's MACs, and the widest one.
ROUTER_SHARE, WIDEST = 0.02, 32
# Larger images are pooled to at most this side first.
_LARGEST_SIDE = 64


class Router(nn.Module):
    """A small network that predicts which subnet an image belongs to: three convolutions and a linear layer.

    Attributes:
      count: number of subnets, K.
      features: filters of the first convolution; the others have twice and four times as many.
    """

    count: int
    features: int = 16

    @nn.compact
    def __call__(self, images: Float[Array, "N H W channels"], train: bool = False) -> Outputs:
        """`Outputs` whose logits are those of the subnets, [N, K]."""
        x = as_activations(images)
        while min(x.shape[1:3]) > _LARGEST_SIDE:
            x = x.map(lambda maps: nn.avg_pool(maps, (2, 2), strides=(2, 2)))
        for index in range(3):
            strides = 2 if min(x.shape[1:3]) >= 4 else 1
            x = GatedUnit(self.features * 2**index, strides=strides, name=f"conv{index}")(x, train)
        return Classifier(self.count, name="classifier")(x)


def router_macs(router: nn.Module | None, image_shape: Sequence[int]) -> float:
    """Exact MACs of a router for an image [H, W, channels]; 0 for none."""
    if router is None:
        return 0.0
    images = jnp.zeros((1, *image_shape))
    outputs, _ = jax.eval_shape(router.init_with_output, jax.random.key(0), images)
    return float(macs(outputs)[0])


def make_router(
    count: int, image_shape: Sequence[int], dense_macs: float, share: float = ROUTER_SHARE
) -> Router | None:
    """The widest router that costs at most a share of the dense network's MACs; None for a single subnet.

    Args:
      image_shape: [H, W, channels].
    """
    if count == 1:
        return None
    low, high = 1, WIDEST
    while low < high:
        middle = (low + high + 1) // 2
        fits = router_macs(Router(count, middle), image_shape) <= share * dense_macs
        low, high = (middle, high) if fits else (low, middle - 1)
    return Router(count, low)


def routing_macs(count: int, image_shape: Sequence[int], dense_macs: float) -> float:
    """Exact MACs of the router that `make_router` makes for so many subnets; its arguments are these."""
    return router_macs(make_router(count, image_shape, dense_macs), image_shape)


class SubnetNetwork(nn.Module):
    """A network that runs each image in the subnet that its router chooses.

    Its variables are those of the network, without gate heads, and `router`; each subnet has batch norms of its own,
    [K, C]. Here, where it is trained, every filter is computed and those of other subnets are set to zero;
    `ftwt.compact` makes K narrower networks of it.

    Attributes:
      network: a network of `GatedUnit`s with gates.
      subnets: what `ftwt.find_subnets` found in it.
      router: a module from images to `Outputs` with K logits, such as `ftwt.make_router` makes; None for one subnet.
    """

    network: nn.Module
    subnets: Subnets
    router: nn.Module | None = None

    def setup(self) -> None:
        """Gives the network's layers the names that they have without subnets."""
        nn.share_scope(self, self.network)

    def __call__(
        self, images: Float[Array, "N H W channels"], train: bool = False, control: GateControl | None = None
    ) -> Outputs:
        """Classifies images; where a control's `choice` is not negative, it overrules the router.

        The task loss does not train the router.
        """
        control = control or GateControl()
        layers: Sequence[Any] = ()
        if self.router is None:
            logits = jnp.zeros((images.shape[0], 1))
        else:
            routed = self.router(images, train)
            logits, layers = routed.logits, [layer.replace(extra=True) for layer in routed.layers]
        choice = jnp.argmax(logits, axis=-1)
        if control.choice is not None:
            choice = jnp.where(control.choice < 0, choice, control.choice)
        masks: Any = {name: jnp.asarray(mask) for name, mask in self.subnets.masks.items()}
        control = control.replace(masks="subnets", subnets=masks, choice=choice, targets=control.targets and not train)
        outputs = self.network(Activations(images, control=control), **train_option(self.network, train))
        return outputs.replace(layers=Layers((*layers, *outputs.layers)), routes=Routes(logits, choice))


def init_subnets(
    model: SubnetNetwork, variables: Mapping[str, Any], images: Float[Array, "N H W channels"], rng: Array
) -> dict[str, Any]:
    """Variables of a network with subnets: those that it was found in, without their heads, and a fresh router.

    Args:
      variables: `params` and `batch_stats` of the network, gated or dense.
      images: any batch of the right shape.
      rng: key from which the router is made.

    Raises:
      UserError: the variables are of another network.
    """
    shapes = flatten_dict(jax.eval_shape(model.init, rng, images), sep="/")
    known = flatten_dict({kind: dict(variables.get(kind, {})) for kind in COLLECTIONS}, sep="/")
    found = {name: known.get(name) for name in shapes if f"/{ROUTER_NAME}/" not in name}
    for name, value in found.items():
        # The batch norms of all subnets begin as that of the network.
        if value is not None and shapes[name].shape == (model.subnets.count, *jnp.shape(value)):
            found[name] = jnp.broadcast_to(value, shapes[name].shape)
    wrong = [name for name, value in found.items() if value is None or jnp.shape(value) != shapes[name].shape]
    if wrong:
        raise UserError(f"the variables are of another network than the subnets: {listed(wrong, LISTED)}")
    router = {} if model.router is None else jax.jit(model.router.init)(rng, images)
    return _with_router(unflatten_dict(found, sep="/"), router)


def init_evenly(
    model: SubnetNetwork, variables: Mapping[str, Any], images: Float[Array, "N H W channels"], rng: Array
) -> dict[str, Any]:
    """As `init_subnets`, with a router that nobody trained and that sends these images to all subnets, for timings."""
    made = init_subnets(model, variables, images[:1], rng)
    if model.router is None:
        return made
    router = split_variables(made)[1]
    head = router["params"]["classifier"]["dense"]
    head["bias"] = head["bias"] - jnp.mean(jax.jit(model.router.apply)(router, images).logits, axis=0)
    return made


def train_option(network: nn.Module, train: bool) -> dict[str, bool]:
    """`train` as an argument of a network, if it takes one."""
    return {"train": train} if "train" in inspect.signature(type(network).__call__).parameters else {}


def _with_router(variables: Mapping[str, Any], router: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a network and those of a router as those of a `SubnetNetwork`."""
    return {
        kind: {**variables.get(kind, {}), **({ROUTER_NAME: router[kind]} if kind in router else {})}
        for kind in {**variables, **router}
    }


def subnet_variables(variables: Mapping[str, Any], subnet: int, count: int) -> dict[str, Any]:
    """The variables of a `SubnetNetwork`'s network for one of its K subnets alone: its own batch norms.

    A batch norm [C] is one for all, as are those outside of units.

    Raises:
      UserError: they are of another number of subnets.
    """

    def own(path: tuple[str, ...], leaf: Any) -> Any:
        if path[-2:-1] != (BATCH_NORM,) or leaf.ndim != 2:
            return leaf
        if len(leaf) != count:
            raise UserError(
                f"{'/'.join(path)} of shape {leaf.shape} is not that of {count} subnets: make variables by "
                "ftwt.init_subnets, or train them"
            )
        return leaf[subnet]

    return unflatten_dict({path: own(path, leaf) for path, leaf in flatten_dict(dict(variables)).items()})


def split_variables(variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of a `SubnetNetwork` in two: its network's, and its router's (empty if it has none)."""
    network, router = {}, {}
    for kind, tree in variables.items():
        network[kind] = {name: leaf for name, leaf in tree.items() if name != ROUTER_NAME}
        if ROUTER_NAME in tree:
            router[kind] = tree[ROUTER_NAME]
    return network, router
