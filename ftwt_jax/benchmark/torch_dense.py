"""The dense networks as a PyTorch user would write them, with the weights of ours: to time PyTorch beside JAX.

Eager modules, everything [N, C, H, W], batch norm not folded. Importing this needs PyTorch, the extra `convert`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import Tensor, nn

from ftwt_jax.errors import UserError
from ftwt_jax.models.mobilenet import V1_PAIRS, V2_STAGES, MobileNetV1, MobileNetV2
from ftwt_jax.models.resnet import ResNet
from ftwt_jax.models.vgg import POOL, VGG
from ftwt_jax.ops.batch_norm import EPSILON

# Tensors in the layout of Flax by their whole path, such as "params/stem/conv/kernel".
Weights = dict[str, Tensor]
Activation = Callable[..., nn.Module]


def torch_network(model: flax.linen.Module, variables: dict[str, Any]) -> nn.Module:
    """The dense network of `model` in PyTorch, in eval mode: float32 [N, channels, H, W] to logits [N, classes].

    Weights are copied, in float32 whatever the model computes in. Gates and their heads are left out.

    Args:
      model: what `create_model` returns.
      variables: its parameters and batch statistics.

    Raises:
      UserError: the network is none of this library's.
    """
    flat = flatten_dict(variables, sep="/")
    weights = {path: torch.from_numpy(np.array(leaf, np.float32)) for path, leaf in flat.items()}
    # Bound, since one of the networks is told by its variables.
    bound = model.bind(variables)
    if isinstance(bound, VGG):
        layers = _vgg(bound, weights)
    elif isinstance(bound, ResNet):
        layers = _resnet(bound, weights)
    elif isinstance(bound, MobileNetV1):
        layers = _mobilenet_v1(bound, weights)
    elif isinstance(bound, MobileNetV2):
        layers = _mobilenet_v2(bound, weights)
    else:
        raise UserError(f"--torch knows VGG, ResNet, MobileNetV1 and MobileNetV2; got {type(model).__name__}")
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), _classifier(weights)).eval()


class Residual(nn.Module):
    """`act(branch(x) + shortcut(x))` on feature maps [N, C, H, W]."""

    def __init__(self, branch: list[nn.Module], shortcut: nn.Module, act: nn.Module):
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.shortcut, self.act = shortcut, act

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += self.shortcut(x)
        return self.act(y)


def _channels(weights: Weights, unit: str) -> tuple[int, int]:
    """Channels that a unit's convolution takes in a group, and its filters."""
    _, _, inputs, filters = weights[f"params/{unit}/conv/kernel"].shape
    return inputs, filters


def _unit(
    weights: Weights, name: str, act: Activation | None = None, stride: int = 1, depthwise: bool = False
) -> list[nn.Module]:
    """Convolution, batch norm and activation of the unit of this name, with its weights."""
    inputs, filters = _channels(weights, name)
    groups = filters if depthwise else 1
    # HWIO to OIHW.
    ours = {"weight": weights[f"params/{name}/conv/kernel"].permute(3, 2, 0, 1)}
    if (bias := weights.get(f"params/{name}/conv/bias")) is not None:
        ours["bias"] = bias
    side = ours["weight"].shape[-1]
    conv = nn.Conv2d(inputs * groups, filters, side, stride, side // 2, groups=groups, bias="bias" in ours)
    conv.load_state_dict(ours)
    norm = nn.BatchNorm2d(filters, eps=EPSILON)
    ours = {
        "weight": weights[f"params/{name}/bn/scale"],
        "bias": weights[f"params/{name}/bn/bias"],
        "running_mean": weights[f"batch_stats/{name}/bn/mean"],
        "running_var": weights[f"batch_stats/{name}/bn/var"],
    }
    # It also counts batches, which ours does not.
    norm.load_state_dict(norm.state_dict() | ours)
    return [conv, norm] if act is None else [conv, norm, act(inplace=True)]


def _classifier(weights: Weights) -> nn.Linear:
    kernel = weights["params/classifier/dense/kernel"]
    linear = nn.Linear(*kernel.shape)
    linear.load_state_dict({"weight": kernel.T, "bias": weights["params/classifier/dense/bias"]})
    return linear


def _vgg(model: VGG, weights: Weights) -> list[nn.Module]:
    layers: list[nn.Module] = []
    index = itertools.count()
    for step in model.plan:
        layers += [nn.MaxPool2d(2)] if step == POOL else _unit(weights, f"unit{next(index)}", nn.ReLU)
    return layers


def _resnet(model: ResNet, weights: Weights) -> list[nn.Module]:
    imagenet = model.stem == "imagenet"
    layers = _unit(weights, "stem", nn.ReLU, stride=2 if imagenet else 1)
    if imagenet:
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    for stage, blocks in enumerate(model.stage_sizes):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(_residual_block(model, weights, f"stage{stage + 1}_block{block}", stride))
    return layers


def _residual_block(model: ResNet, weights: Weights, block: str, stride: int) -> Residual:
    if model.bottleneck:
        last = f"{block}/conv3"
        branch = _unit(weights, f"{block}/conv1", nn.ReLU) + _unit(weights, f"{block}/conv2", nn.ReLU, stride)
    else:
        last = f"{block}/conv2"
        branch = _unit(weights, f"{block}/conv1", nn.ReLU, stride)
    branch += _unit(weights, last)

    inputs, filters = _channels(weights, f"{block}/conv1")[0], _channels(weights, last)[1]
    shortcut: nn.Module = nn.Identity()
    if stride != 1 or inputs != filters:
        if model.projection:
            shortcut = nn.Sequential(*_unit(weights, f"{block}/shortcut", stride=stride))
        else:
            # Odd sizes round up, as in the branch. The padding is for depth, height and width: depth is the channels.
            pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
            shortcut = nn.Sequential(pool, nn.ZeroPad3d((0, 0, 0, 0, 0, filters - inputs)))
    return Residual(branch, shortcut, nn.ReLU(inplace=True))


def _mobilenet_v1(model: MobileNetV1, weights: Weights) -> list[nn.Module]:
    imagenet = model.stem == "imagenet"
    act = nn.ReLU6 if imagenet else nn.ReLU
    layers = _unit(weights, "stem", act, stride=2 if imagenet else 1)
    for index, (_, stride) in enumerate(V1_PAIRS):
        layers += _unit(weights, f"pair{index}_depthwise", act, stride, depthwise=True)
        layers += _unit(weights, f"pair{index}_pointwise", act)
    return layers


def _mobilenet_v2(model: MobileNetV2, weights: Weights) -> list[nn.Module]:
    imagenet = model.stem == "imagenet"
    projection = model.stem == "cifar" and model._has_projections()
    unstrided = () if imagenet else (1,) if projection else (1, 2)
    layers = _unit(weights, "stem", nn.ReLU6, stride=2 if imagenet else 1)
    index = itertools.count()
    for stage, (expansion, _, blocks, first) in enumerate(V2_STAGES):
        for block in range(blocks):
            stride = 1 if block or stage in unstrided else first
            skips_expansion = imagenet and expansion == 1
            layers += _inverted_residual(weights, f"block{next(index)}", stride, skips_expansion, projection)
    return layers + _unit(weights, "last", nn.ReLU6)


def _inverted_residual(
    weights: Weights, block: str, stride: int, skips_expansion: bool, projection: bool
) -> list[nn.Module]:
    branch = [] if skips_expansion else _unit(weights, f"{block}/expand", nn.ReLU6)
    branch += _unit(weights, f"{block}/depthwise", nn.ReLU6, stride, depthwise=True)
    branch += _unit(weights, f"{block}/project")
    # A depthwise kernel does not say how many channels it takes; what follows it does.
    inputs, _ = _channels(weights, f"{block}/project" if skips_expansion else f"{block}/expand")
    _, filters = _channels(weights, f"{block}/project")
    same = inputs == filters
    if stride != 1 or not (same or projection):
        return branch
    shortcut = nn.Identity() if same else nn.Sequential(*_unit(weights, f"{block}/shortcut"))
    return [Residual(branch, shortcut, nn.Identity())]
