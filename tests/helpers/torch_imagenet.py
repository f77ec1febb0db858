"""Networks in PyTorch, dense, under the names of torchvision, timm and kuangliu; to compare with ours."""

import functools
import math

import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.torch_networks import (
    POOL,
    Layer,
    Network,
    Outputs,
    bottleneck_sizes,
    conv,
    named_unit,
    pairs,
    residual_stages,
    run,
    with_norm,
)


class TorchvisionBlock(Layer):
    def __init__(self, inputs: int, features: int, stride: int, bottleneck: bool, shortcut: str = "downsample"):
        super().__init__()
        sizes = [(inputs, features, 3, stride), (features, features, 3, 1)]
        if bottleneck:
            sizes = [(inputs, features, 1, 1), (features, features, 3, stride), (features, 4 * features, 1, 1)]
        self.units = tuple(
            named_unit(self, f"conv{i} bn{i}", conv(*size), F.relu) for i, size in enumerate(sizes, start=1)
        )
        filters = sizes[-1][1]
        self.shortcut_name = shortcut
        changes = stride != 1 or inputs != filters
        self.add_module(
            shortcut, with_norm(conv(inputs, filters, kernel=1, stride=stride)) if changes else nn.Identity()
        )

    def forward(self, x: Tensor, outputs: Outputs) -> Tensor:
        *first, last = self.units
        return last(run(first, x, outputs), outputs, residual=getattr(self, self.shortcut_name)(x))


class TorchvisionResNet(Network):
    """ImageNet's ResNets: (2, 2, 2, 2) is 18, (3, 4, 6, 3) is 34, or 50 with `bottleneck`."""

    def __init__(self, num_classes=1000, stage_sizes=(2, 2, 2, 2), bottleneck=False, features=64, channels=3):
        super().__init__()
        stem = named_unit(self, "conv1 bn1", conv(channels, features, kernel=7, stride=2), F.relu)
        growth = 4 if bottleneck else 1
        block = functools.partial(TorchvisionBlock, bottleneck=bottleneck)
        layers = residual_stages(self, stage_sizes, features, growth, block)
        self.fc = nn.Linear(growth * features * 2 ** (len(stage_sizes) - 1), num_classes)
        self.stack = (stem, nn.MaxPool2d(3, stride=2, padding=1), *layers, POOL, self.fc)


class KuangliuResNet(Network):
    """The same for small images."""

    def __init__(self, num_classes=10, stage_sizes=(2, 2, 2, 2), bottleneck=False, features=64, channels=3):
        super().__init__()
        stem = named_unit(self, "conv1 bn1", conv(channels, features), F.relu)
        growth = 4 if bottleneck else 1
        block = functools.partial(TorchvisionBlock, bottleneck=bottleneck, shortcut="shortcut")
        layers = residual_stages(self, stage_sizes, features, growth, block)
        self.linear = nn.Linear(growth * features * 2 ** (len(stage_sizes) - 1), num_classes)
        self.stack = (stem, *layers, POOL, self.linear)


def multiple_of_8(filters: float) -> int:
    """The nearest multiple of 8, or the next one if that would lose more than a tenth."""
    nearest = max(8, 8 * math.floor(filters / 8 + 0.5))
    return nearest if nearest >= 0.9 * filters else nearest + 8


class TorchvisionInvertedResidual(nn.Module):
    def __init__(self, inputs: int, filters: int, expansion: int, stride: int):
        super().__init__()
        hidden = expansion * inputs
        expand = [with_norm(conv(inputs, hidden, kernel=1), nn.ReLU6())] if expansion > 1 else []
        depthwise = with_norm(conv(hidden, hidden, stride=stride, groups=hidden), nn.ReLU6())
        self.conv = nn.Sequential(*expand, depthwise, *with_norm(conv(hidden, filters, kernel=1)))
        self.identity = stride == 1 and inputs == filters

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)


class TorchvisionMobileNetV2(Network):
    def __init__(self, num_classes=1000, width=1.0, channels=3):
        super().__init__()
        # The last convolution only ever grows with the width.
        inputs, last = multiple_of_8(width * 320), multiple_of_8(max(1.0, width) * 1280)
        sizes = bottleneck_sizes(lambda n: multiple_of_8(width * n), {24: 2, 32: 2, 64: 2, 160: 2})
        self.features = nn.Sequential(
            with_norm(conv(channels, multiple_of_8(width * 32), stride=2), nn.ReLU6()),
            *[TorchvisionInvertedResidual(*size) for size in sizes],
            with_norm(conv(inputs, last, kernel=1), nn.ReLU6()),
        )
        # The first place is dropout's, left out so that training mode can be compared.
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(last, num_classes))
        self.stack = (self.features, POOL, self.classifier)


class TimmMobileNetV1(Network):
    def __init__(self, num_classes=1000, width=1.0, channels=3):
        super().__init__()
        units = [named_unit(self, "conv_stem bn1", conv(channels, int(width * 32), stride=2), F.relu6)]
        self.blocks = nn.ModuleList([nn.ModuleList()])
        for depthwise, pointwise, stride in pairs(width):
            if stride == 2:  # Every stage but the first starts so.
                self.blocks.append(nn.ModuleList())
            pair = nn.Module()
            units.append(named_unit(pair, "conv_dw bn1", depthwise, F.relu6))
            units.append(named_unit(pair, "conv_pw bn2", pointwise, F.relu6))
            self.blocks[-1].append(pair)
        self.classifier = nn.Linear(int(width * 1024), num_classes)
        self.stack = (*units, POOL, self.classifier)
