"""Inception-v3 and v4 in PyTorch, dense, with the parameter names and the arithmetic of torchvision and timm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.torch_more import linear

EPSILON = 1e-3


class ConvNormRelu(nn.Module):
    """torchvision's BasicConv2d and timm's ConvNormAct of the Inceptions."""

    def __init__(self, inputs: int, filters: int, kernel=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, filters, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(filters, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _max(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


class V3A(nn.Module):
    def __init__(self, inputs: int, n, pooled: int):
        super().__init__()
        self.branch1x1 = ConvNormRelu(inputs, n(64))
        self.branch5x5_1 = ConvNormRelu(inputs, n(48))
        self.branch5x5_2 = ConvNormRelu(n(48), n(64), 5, padding=2)
        self.branch3x3dbl_1 = ConvNormRelu(inputs, n(64))
        self.branch3x3dbl_2 = ConvNormRelu(n(64), n(96), 3, padding=1)
        self.branch3x3dbl_3 = ConvNormRelu(n(96), n(96), 3, padding=1)
        self.branch_pool = ConvNormRelu(inputs, n(pooled))

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_mean(x))], 1
        )


class V3B(nn.Module):
    def __init__(self, inputs: int, n):
        super().__init__()
        self.branch3x3 = ConvNormRelu(inputs, n(384), 3, 2)
        self.branch3x3dbl_1 = ConvNormRelu(inputs, n(64))
        self.branch3x3dbl_2 = ConvNormRelu(n(64), n(96), 3, padding=1)
        self.branch3x3dbl_3 = ConvNormRelu(n(96), n(96), 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _max(x)], 1)


class V3C(nn.Module):
    def __init__(self, inputs: int, n, narrow: int):
        super().__init__()
        c = n(narrow)
        self.branch1x1 = ConvNormRelu(inputs, n(192))
        self.branch7x7_1 = ConvNormRelu(inputs, c)
        self.branch7x7_2 = ConvNormRelu(c, c, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvNormRelu(c, n(192), (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvNormRelu(inputs, c)
        self.branch7x7dbl_2 = ConvNormRelu(c, c, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvNormRelu(c, c, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvNormRelu(c, c, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvNormRelu(c, n(192), (1, 7), padding=(0, 3))
        self.branch_pool = ConvNormRelu(inputs, n(192))

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_mean(x))], 1)


class V3D(nn.Module):
    def __init__(self, inputs: int, n):
        super().__init__()
        self.branch3x3_1 = ConvNormRelu(inputs, n(192))
        self.branch3x3_2 = ConvNormRelu(n(192), n(320), 3, 2)
        self.branch7x7x3_1 = ConvNormRelu(inputs, n(192))
        self.branch7x7x3_2 = ConvNormRelu(n(192), n(192), (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNormRelu(n(192), n(192), (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNormRelu(n(192), n(192), 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, _max(x)], 1)


class V3E(nn.Module):
    def __init__(self, inputs: int, n):
        super().__init__()
        self.branch1x1 = ConvNormRelu(inputs, n(320))
        self.branch3x3_1 = ConvNormRelu(inputs, n(384))
        self.branch3x3_2a = ConvNormRelu(n(384), n(384), (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNormRelu(n(384), n(384), (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNormRelu(inputs, n(448))
        self.branch3x3dbl_2 = ConvNormRelu(n(448), n(384), 3, padding=1)
        self.branch3x3dbl_3a = ConvNormRelu(n(384), n(384), (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNormRelu(n(384), n(384), (3, 1), padding=(1, 0))
        self.branch_pool = ConvNormRelu(inputs, n(192))

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        halves = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        halves += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *halves, self.branch_pool(_mean(x))], 1)


class V3Auxiliary(nn.Module):
    def __init__(self, inputs: int, n, num_classes: int):
        super().__init__()
        self.conv0, self.conv1 = ConvNormRelu(inputs, n(128)), ConvNormRelu(n(128), n(768), 5)
        self.fc = linear(n(768), num_classes)


class InceptionV3(nn.Module):
    """torchvision's, with its auxiliary classifier if `auxiliary`."""

    def __init__(self, num_classes=1000, stage_sizes=(3, 4, 2), width=1.0, auxiliary=True):
        super().__init__()

        def n(filters: int) -> int:
            return max(1, int(filters * width))

        first, second, third = stage_sizes
        self.Conv2d_1a_3x3 = ConvNormRelu(3, n(32), 3, 2)
        self.Conv2d_2a_3x3 = ConvNormRelu(n(32), n(32), 3)
        self.Conv2d_2b_3x3 = ConvNormRelu(n(32), n(64), 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormRelu(n(64), n(80))
        self.Conv2d_4a_3x3 = ConvNormRelu(n(80), n(192), 3)
        features = n(192)
        for letter, pooled in list(zip("bcd", (32, 64, 64), strict=True))[:first]:
            self.add_module(f"Mixed_5{letter}", V3A(features, n, pooled))
            features = 2 * n(64) + n(96) + n(pooled)
        self.Mixed_6a = V3B(features, n)
        features += n(384) + n(96)
        for letter, narrow in list(zip("bcde", (128, 160, 160, 192), strict=True))[:second]:
            self.add_module(f"Mixed_6{letter}", V3C(features, n, narrow))
            features = 4 * n(192)
        if auxiliary:
            self.AuxLogits = V3Auxiliary(features, n, num_classes)
        self.Mixed_7a = V3D(features, n)
        features += n(320) + n(192)
        for letter in "bc"[:third]:
            self.add_module(f"Mixed_7{letter}", V3E(features, n))
            features = n(320) + 4 * n(384) + n(192)
        self.fc = linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = _max(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _max(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name, block in self.named_children():
            x = block(x) if name.startswith("Mixed") else x
        return self.fc(x.mean((2, 3)))


class Concatenated(nn.Module):
    """Branches of timm's Inception-v4 side by side, under their names; None: a max pool at stride 2."""

    def __init__(self, **branches: nn.Module | None):
        super().__init__()
        self.order = list(branches)
        for name, branch in branches.items():
            self.add_module(name, branch or nn.MaxPool2d(3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in self.order], 1)


def _v4_pool() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _v4_sequence(inputs: int, *steps: tuple) -> nn.Sequential:
    """Units of (filters, kernel, stride, padding)."""
    units = []
    for filters, *rest in steps:
        units.append(ConvNormRelu(inputs, filters, *rest))
        inputs = filters
    return nn.Sequential(*units)


ROW, COLUMN = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
SAME = (3, 1, 1)


class V4C(nn.Module):
    def __init__(self, inputs: int, n):
        super().__init__()
        row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        self.branch0 = ConvNormRelu(inputs, n(256))
        self.branch1_0 = ConvNormRelu(inputs, n(384))
        self.branch1_1a = ConvNormRelu(n(384), n(256), *row)
        self.branch1_1b = ConvNormRelu(n(384), n(256), *column)
        self.branch2_0 = ConvNormRelu(inputs, n(384))
        self.branch2_1 = ConvNormRelu(n(384), n(448), *column)
        self.branch2_2 = ConvNormRelu(n(448), n(512), *row)
        self.branch2_3a = ConvNormRelu(n(512), n(256), *row)
        self.branch2_3b = ConvNormRelu(n(512), n(256), *column)
        self.branch3 = nn.Sequential(_v4_pool(), ConvNormRelu(inputs, n(256)))

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1_0(x)
        two = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        halves = [self.branch1_1a(one), self.branch1_1b(one), self.branch2_3a(two), self.branch2_3b(two)]
        return torch.cat([self.branch0(x), *halves, self.branch3(x)], 1)


class InceptionV4(nn.Module):
    """timm's."""

    def __init__(self, num_classes=1000, stage_sizes=(4, 7, 3), width=1.0):
        super().__init__()

        def n(filters: int) -> int:
            return max(1, int(filters * width))

        first, second, third = stage_sizes
        blocks = [
            ConvNormRelu(3, n(32), 3, 2),
            ConvNormRelu(n(32), n(32), 3),
            ConvNormRelu(n(32), n(64), 3, padding=1),
            Concatenated(maxpool=None, conv=ConvNormRelu(n(64), n(96), 3, 2)),
        ]
        inputs = n(64) + n(96)
        blocks.append(
            Concatenated(
                branch0=_v4_sequence(inputs, (n(64),), (n(96), 3)),
                branch1=_v4_sequence(inputs, (n(64),), (n(64), *ROW), (n(64), *COLUMN), (n(96), 3)),
            )
        )
        blocks.append(Concatenated(conv=ConvNormRelu(2 * n(96), n(192), 3, 2), maxpool=None))
        inputs = n(192) + 2 * n(96)
        for _ in range(first):
            blocks.append(
                Concatenated(
                    branch0=ConvNormRelu(inputs, n(96)),
                    branch1=_v4_sequence(inputs, (n(64),), (n(96), *SAME)),
                    branch2=_v4_sequence(inputs, (n(64),), (n(96), *SAME), (n(96), *SAME)),
                    branch3=nn.Sequential(_v4_pool(), ConvNormRelu(inputs, n(96))),
                )
            )
            inputs = 4 * n(96)
        blocks.append(
            Concatenated(
                branch0=ConvNormRelu(inputs, n(384), 3, 2),
                branch1=_v4_sequence(inputs, (n(192),), (n(224), *SAME), (n(256), 3, 2)),
                branch2=None,
            )
        )
        inputs += n(384) + n(256)
        for _ in range(second):
            long = [(n(192),), (n(192), *COLUMN), (n(224), *ROW), (n(224), *COLUMN), (n(256), *ROW)]
            blocks.append(
                Concatenated(
                    branch0=ConvNormRelu(inputs, n(384)),
                    branch1=_v4_sequence(inputs, (n(192),), (n(224), *ROW), (n(256), *COLUMN)),
                    branch2=_v4_sequence(inputs, *long),
                    branch3=nn.Sequential(_v4_pool(), ConvNormRelu(inputs, n(128))),
                )
            )
            inputs = n(384) + 2 * n(256) + n(128)
        blocks.append(
            Concatenated(
                branch0=_v4_sequence(inputs, (n(192),), (n(192), 3, 2)),
                branch1=_v4_sequence(inputs, (n(256),), (n(256), *ROW), (n(320), *COLUMN), (n(320), 3, 2)),
                branch2=None,
            )
        )
        inputs += n(192) + n(320)
        for _ in range(third):
            blocks.append(V4C(inputs, n))
            inputs = 6 * n(256)
        self.features = nn.Sequential(*blocks)
        self.last_linear = linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_linear(self.features(x).mean((2, 3)))
