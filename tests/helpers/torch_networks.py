"""The networks whose weights we import, in PyTorch.

They write checkpoints under the names of each layout, and imported networks must reproduce their outputs.
They have the names of the published code and can be gated. Everything is NCHW.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (filters, stride) of each depthwise-separable pair of MobileNetV1; (filters, blocks) of each stage of MobileNetV2.
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
STAGES = ((16, 1), (24, 2), (32, 3), (64, 4), (96, 3), (160, 3), (320, 1))


@dataclasses.dataclass
class Outputs:
    """What a gated network returns; its units fill it on the way. Lists are in forward order, of [N, C]."""

    r: float
    channels: int
    logits: Any = None
    gate_logits: list[Tensor] = dataclasses.field(default_factory=list)
    masks: list[Tensor] = dataclasses.field(default_factory=list)
    targets: list[Tensor] = dataclasses.field(default_factory=list)
    macs: Any = 0  # int64 [N], counted the published way.

    def add(self, convolution: nn.Conv2d, feature_maps: Tensor, gate_logits: Tensor) -> Tensor:
        """Records one unit, given its own output before masking, and returns its mask."""
        mask = gate_logits > 0
        previous = self.masks[-1].sum(1) if self.masks else self.channels
        # Rounding down is theirs: a depthwise unit is free as soon as one input channel is off.
        pairs = mask.sum(1) * (previous // convolution.groups)
        self.macs = self.macs + pairs * feature_maps[0, 0].numel() * convolution.kernel_size[0] ** 2
        self.gate_logits.append(gate_logits)
        self.masks.append(mask)
        self.targets.append(target(feature_maps.detach(), self.r))
        return mask


def target(feature_maps: Tensor, r: float) -> Tensor:
    """The published rule on [N, C, H, W]: which filters hold the share `r` of the heatmap mass, bool [N, C]."""
    mass = feature_maps.abs().amax((2, 3))
    # An all-zero image is 0 / 0 here, and no comparison with NaN keeps a filter.
    share = mass / mass.sum(1, keepdim=True)
    if r == 1:
        return share > 1e-5
    descending, order = share.sort(dim=1, descending=True, stable=True)
    kept = descending.cumsum(1) <= r + 1e-5
    return torch.zeros_like(kept).scatter(1, order, kept)


def gate_loss(outputs: Outputs) -> Tensor:
    """Binary cross-entropy summed over filters, averaged over images and units."""
    losses = [
        F.binary_cross_entropy_with_logits(logits, wanted.to(logits), reduction="none").sum(1).mean()
        for logits, wanted in zip(outputs.gate_logits, outputs.targets, strict=True)
    ]
    return torch.stack(losses).mean()


class Head(nn.Module):
    """Gate head: reads a unit's input, gives its gate logits."""

    def __init__(self, inputs: int, filters: int):
        super().__init__()
        # Pool and softmax have no tensors, so only this layer shows in a checkpoint.
        self.model = nn.Sequential(collections.OrderedDict({"1Conv2dMask": nn.Conv2d(inputs, filters, 1)}))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.mean((2, 3), keepdim=True).softmax(1)).flatten(1)


class Layer(nn.Module):
    """A layer that is handed the network's `Outputs` too."""


class Unit(Layer):
    """Convolution, batch norm, an optional addition and activation; gated, a head then switches filters off."""

    def __init__(self, convolution: nn.Conv2d, bn: nn.BatchNorm2d, act: Callable | None, gated: bool):
        super().__init__()
        self.mask = Head(convolution.in_channels, convolution.out_channels) if gated else None
        self.conv, self.bn, self.act = convolution, bn, act

    def forward(self, x: Tensor, outputs: Outputs, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        if residual is not None:
            y = y + residual
        if self.act is not None:
            y = self.act(y)
        if self.mask is None:
            return y
        mask = outputs.add(self.conv, y, self.mask(x.detach()))
        return y * mask[:, :, None, None]


def run(layers: Iterable[nn.Module], x: Tensor, outputs: Outputs) -> Tensor:
    for layer in layers:
        x = layer(x, outputs) if isinstance(layer, Layer) else layer(x)
    return x


class Network(nn.Module):
    """Runs the layers of `stack` on images; returns logits [N, classes], or `Outputs` if gated.

    `stack` is a tuple, like the `units` of a block, so that PyTorch takes no names from it.
    """

    stack: tuple[nn.Module, ...]

    def __init__(self, gated: bool = False, r: float = 0.9):
        super().__init__()
        self.gated, self.r = gated, r

    def forward(self, images: Tensor) -> Any:
        outputs = Outputs(self.r, images.shape[1])
        outputs.logits = run(self.stack, images, outputs)
        return outputs if self.gated else outputs.logits


POOL = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv(inputs: int, filters: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)


def with_norm(convolution: nn.Conv2d, *act: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), *act)


def named_unit(owner: nn.Module, names: str, convolution: nn.Conv2d, act: Callable | None, gated: bool = False) -> Unit:
    """A unit whose convolution and batch norm belong to `owner`, under the first two of `names`.

    A gated one belongs to `owner` as well, under the third, which gives its tensors a second name.
    """
    bn = nn.BatchNorm2d(convolution.out_channels)
    unit = Unit(convolution, bn, act, gated)
    owned = (convolution, bn, unit) if gated else (convolution, bn)
    for name, module in zip(names.split(), owned, strict=False):
        owner.add_module(name, module)
    return unit


def residual_stages(owner: nn.Module, stage_sizes: Iterable[int], features: int, growth: int, block: Callable) -> list:
    """Adds `layer1`, `layer2`, ... to `owner`, made of `block(inputs, features, stride)`; returns all blocks."""
    blocks: list[nn.Module] = []
    inputs = features
    for stage, size in enumerate(stage_sizes):
        for index in range(size):
            blocks.append(block(inputs, features * 2**stage, 2 if stage > 0 and index == 0 else 1))
            inputs = growth * features * 2**stage
        owner.add_module(f"layer{stage + 1}", nn.Sequential(*blocks[-size:]))
    return blocks


class ResidualBlock(Layer):
    def __init__(self, inputs: int, filters: int, stride: int, gated: bool, after_block: bool):
        super().__init__()
        self.stride, self.extra, self.after_block = stride, filters - inputs, after_block
        act = F.relu if after_block else None
        self.units = (
            named_unit(self, "conv1 bn1 masked_conv1", conv(inputs, filters, stride=stride), F.relu, gated),
            named_unit(self, "conv2 bn2 masked_conv2", conv(filters, filters), act, gated),
        )

    def forward(self, x: Tensor, outputs: Outputs) -> Tensor:
        first, second = self.units
        shortcut = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.extra))
        y = first(x, outputs)
        if self.after_block:
            return second(y, outputs, residual=shortcut)
        return F.relu(second(y, outputs) + shortcut)


class ResNet(Network):
    """ResNet-(6n+2), n = `blocks`."""

    def __init__(self, num_classes=10, blocks=1, gated=False, r=0.9, after_block=False, channels=3):
        super().__init__(gated, r)
        stem = named_unit(self, "conv1 bn1 masked_conv", conv(channels, 16), F.relu, gated)
        block = functools.partial(ResidualBlock, gated=gated, after_block=after_block)
        layers = residual_stages(self, (blocks,) * 3, 16, 1, block)
        self.fc = nn.Linear(64, num_classes)
        self.stack = (stem, *layers, POOL, self.fc)


class VGG(Network):
    """VGG-BN; `plan`: filters of each unit, "M" for a 2x2 max pool."""

    def __init__(self, num_classes=10, plan=(16, "M", 32, "M"), gated=False, r=0.9, channels=3):
        super().__init__(gated, r)
        self.features = nn.Sequential()
        inputs = channels
        for step in plan:
            if step == "M":
                self.features.append(nn.MaxPool2d(2))
                continue
            layers = with_norm(conv(inputs, step, bias=True), nn.ReLU())
            self.features.extend([Unit(layers[0], layers[1], F.relu, gated)] if gated else layers)
            inputs = step
        self.classifier = nn.Linear(inputs, num_classes)
        self.stack = (*self.features, POOL, self.classifier)


def pairs(width: float) -> Iterator[tuple[nn.Conv2d, nn.Conv2d, int]]:
    """MobileNetV1's depthwise and pointwise convolutions, and the stride of each pair."""
    inputs = int(width * 32)
    for pair_filters, stride in PAIRS:
        filters = int(width * pair_filters)
        yield conv(inputs, inputs, stride=stride, groups=inputs), conv(inputs, filters, kernel=1), stride
        inputs = filters


class MobileNetV1(Network):
    def __init__(self, num_classes=10, width=1.0, gated=False, r=0.9, channels=3):
        super().__init__(gated, r)
        groups = [with_norm(conv(channels, int(width * 32)), nn.ReLU())]
        for depthwise, pointwise, _ in pairs(width):
            groups.append(nn.Sequential(*with_norm(depthwise, nn.ReLU()), *with_norm(pointwise, nn.ReLU())))
        if gated:
            flat = [layer for group in groups for layer in group]
            groups = [Unit(flat[i], flat[i + 1], F.relu, gated) for i in range(0, len(flat), 3)]
        self.model = nn.Sequential(*groups)
        self.fc = nn.Linear(int(width * 1024), num_classes)
        self.stack = (*self.model, POOL, self.fc)


def bottleneck_sizes(scaled: Callable[[int], int], strides: dict[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """(inputs, filters, expansion, stride) of MobileNetV2's blocks; `strides`: of a stage's first block, by filters."""
    inputs = scaled(32)
    for filters, blocks in STAGES:
        for block in range(blocks):
            yield inputs, scaled(filters), 1 if filters == 16 else 6, strides.get(filters, 1) if block == 0 else 1
            inputs = scaled(filters)


class Bottleneck(Layer):
    def __init__(self, inputs: int, filters: int, expansion: int, stride: int, projection: bool, gated: bool):
        super().__init__()
        hidden = expansion * inputs
        depthwise = conv(hidden, hidden, stride=stride, groups=hidden)
        self.units = (
            named_unit(self, "conv1 bn1 masked_conv1", conv(inputs, hidden, kernel=1), F.relu6, gated),
            named_unit(self, "conv2 bn2 masked_conv2", depthwise, F.relu6, gated),
            named_unit(self, "conv3 bn3 masked_conv3", conv(hidden, filters, kernel=1), None, gated),
        )
        self.shortcut = None
        if stride == 1 and inputs == filters:
            self.shortcut = nn.Identity()
        elif stride == 1 and projection:
            self.shortcut = with_norm(conv(inputs, filters, kernel=1))

    def forward(self, x: Tensor, outputs: Outputs) -> Tensor:
        y = run(self.units, x, outputs)
        return y if self.shortcut is None else y + self.shortcut(x)


class MobileNetV2(Network):
    """In two variants: `projection` adds shortcuts with weights, and a stride in the 32-filter stage."""

    def __init__(self, num_classes=10, width=1.0, projection=False, gated=False, r=0.9, channels=3):
        super().__init__(gated, r)
        sizes = bottleneck_sizes(lambda n: int(width * n), {32: 2 if projection else 1, 64: 2, 160: 2})
        inputs, last = int(width * 320), int(width * 1280)
        self.bottlenecks = nn.Sequential(*[Bottleneck(*size, projection, gated) for size in sizes])
        self.fc = nn.Linear(last, num_classes)
        self.stack = (
            named_unit(self, "conv0 bn0 masked_conv0", conv(channels, int(width * 32)), F.relu6, gated),
            *self.bottlenecks,
            named_unit(self, "conv1 bn1 masked_conv1", conv(inputs, last, kernel=1), F.relu6, gated),
            POOL,
            self.fc,
        )


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Fills every tensor with random numbers under which signals stay alive and gates differ; returns `model`."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()), generator=rng)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5, generator=rng)
        elif isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5, generator=rng)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.5, generator=rng)
            module.num_batches_tracked.random_(1, 10000, generator=rng)
    for module in model.modules():
        if isinstance(module, Head):
            (layer,) = module.model
            # The softmax hands the head numbers near 1 / C_in. Kernels of size C_in bring them back to 1, and without
            # their mean only what differs between channels counts, which is what differs between images.
            nn.init.normal_(layer.weight, std=layer.in_channels, generator=rng)
            layer.weight -= layer.weight.mean(1, keepdim=True)
            # A bias much larger than that would leave narrow units with the same mask for every image.
            nn.init.normal_(layer.bias, std=0.01, generator=rng)
    return model


def published_checkpoint(model: nn.Module, prefix: str = "module.") -> dict[str, Any]:
    """What the published code saves of a network, for `torch.save`; the prefix is that of `DataParallel`."""
    state = collections.OrderedDict((prefix + name, tensor) for name, tensor in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    return {"epoch": 1, "state_dict": state, "acc": 91.5, "best_acc": 92.25, "optimizers": [optimizer.state_dict()]}


def to_nchw(images: Any) -> Tensor:
    """Images [N, H, W, C], NumPy or JAX, as float32 [N, C, H, W]."""
    return torch.from_numpy(np.array(images, np.float32).transpose(0, 3, 1, 2).copy())
