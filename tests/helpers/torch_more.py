"""Networks for ImageNet in PyTorch, dense, with the parameter names and the arithmetic of torchvision and timm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import torch_networks
from tests.helpers.torch_networks import POOL, conv, with_norm


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """As `torch_networks.randomize`, layer norms and free parameters too."""
    torch_networks.randomize(model, seed)
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=rng)
            nn.init.normal_(module.bias, std=0.5, generator=rng)
        elif not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.5, generator=rng)
    return model


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs)


class DenseNet(nn.Module):
    """torchvision's."""

    def __init__(self, num_classes=1000, stage_sizes=(6, 12, 24, 16), growth=32, features=64):
        super().__init__()
        f = self.features = nn.Sequential()
        f.add_module("conv0", conv(3, features, kernel=7, stride=2))
        f.add_module("norm0", nn.BatchNorm2d(features))
        f.add_module("relu0", nn.ReLU())
        f.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        for stage, layers in enumerate(stage_sizes, start=1):
            block = nn.Sequential()
            for layer in range(1, layers + 1):
                block.add_module(f"denselayer{layer}", DenseLayer(features, growth))
                features += growth
            f.add_module(f"denseblock{stage}", block)
            if stage < len(stage_sizes):
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(features))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", conv(features, features // 2, kernel=1))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                f.add_module(f"transition{stage}", transition)
                features //= 2
        f.add_module("norm5", nn.BatchNorm2d(features))
        self.classifier = linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 4 * growth, kernel=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


# (expansion, side of the depthwise kernel, filters, blocks, stride) of each stage.
B0 = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


class SqueezeExcitation(nn.Module):
    def __init__(self, features: int, squeezed: int, names=("fc1", "fc2")):
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Conv2d(features, squeezed, 1))
        self.add_module(names[1], nn.Conv2d(squeezed, features, 1))

    def forward(self, x: Tensor) -> Tensor:
        squeeze, excite = (self.get_submodule(name) for name in self.names)
        return x * torch.sigmoid(excite(F.silu(squeeze(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    """torchvision's."""

    def __init__(self, inputs: int, filters: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        hidden = inputs * expansion
        layers = [with_norm(conv(inputs, hidden, kernel=1), nn.SiLU())] if expansion > 1 else []
        layers.append(with_norm(conv(hidden, hidden, kernel=kernel, stride=stride, groups=hidden), nn.SiLU()))
        layers.append(SqueezeExcitation(hidden, inputs // 4))
        layers.append(with_norm(conv(hidden, filters, kernel=1)))
        self.block = nn.Sequential(*layers)
        self.identity = stride == 1 and inputs == filters

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.identity else self.block(x)


class TorchvisionEfficientNet(nn.Module):
    def __init__(self, num_classes=1000, stages=B0):
        super().__init__()
        inputs = 32
        layers = [with_norm(conv(3, inputs, stride=2), nn.SiLU())]
        for expansion, kernel, filters, blocks, stride in stages:
            stage = []
            for block in range(blocks):
                stage.append(MBConv(inputs, filters, expansion, kernel, 1 if block else stride))
                inputs = filters
            layers.append(nn.Sequential(*stage))
        layers.append(with_norm(conv(inputs, 4 * inputs, kernel=1), nn.SiLU()))
        self.features = nn.Sequential(*layers)
        # The first place is dropout's.
        self.classifier = nn.Sequential(nn.Identity(), linear(4 * inputs, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(POOL(self.features(x)))


class TimmMBConv(nn.Module):
    def __init__(self, inputs: int, filters: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        hidden = inputs * expansion
        self.identity, self.expands = stride == 1 and inputs == filters, expansion > 1
        if self.expands:
            self.conv_pw, self.bn1 = conv(inputs, hidden, kernel=1), nn.BatchNorm2d(hidden)
        self.conv_dw = conv(hidden, hidden, kernel=kernel, stride=stride, groups=hidden)
        self.add_module("bn2" if self.expands else "bn1", nn.BatchNorm2d(hidden))
        self.se = SqueezeExcitation(hidden, round(inputs / 4), ("conv_reduce", "conv_expand"))
        self.add_module("conv_pwl" if self.expands else "conv_pw", conv(hidden, filters, kernel=1))
        self.add_module("bn3" if self.expands else "bn2", nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        if self.expands:
            y = F.silu(self.bn1(self.conv_pw(x)))
            y = self.bn3(self.conv_pwl(self.se(F.silu(self.bn2(self.conv_dw(y))))))
        else:
            y = self.bn2(self.conv_pw(self.se(F.silu(self.bn1(self.conv_dw(x))))))
        return x + y if self.identity else y


class TimmEfficientNet(nn.Module):
    def __init__(self, num_classes=1000, stages=B0):
        super().__init__()
        inputs = 32
        self.conv_stem, self.bn1 = conv(3, inputs, stride=2), nn.BatchNorm2d(inputs)
        self.blocks = nn.Sequential()
        for expansion, kernel, filters, blocks, stride in stages:
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(TimmMBConv(inputs, filters, expansion, kernel, 1 if block else stride))
                inputs = filters
            self.blocks.append(stage)
        self.conv_head, self.bn2 = conv(inputs, 4 * inputs, kernel=1), nn.BatchNorm2d(4 * inputs)
        self.classifier = linear(4 * inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.silu(self.bn1(self.conv_stem(x))))
        return self.classifier(F.silu(self.bn2(self.conv_head(x))).mean((2, 3)))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.axes)


class TorchvisionConvNeXtBlock(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(features, features, 7, padding=3, groups=features),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(features, eps=1e-6),
            linear(features, 4 * features),
            nn.GELU(),
            linear(4 * features, features),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.zeros(features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.block(x)


class TorchvisionConvNeXt(nn.Module):
    def __init__(self, num_classes=1000, stage_sizes=(3, 3, 9, 3), features=96):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(3, features, 4, stride=4), ChannelNorm(features, eps=1e-6))]
        for stage, blocks in enumerate(stage_sizes):
            if stage:
                down = nn.Conv2d(features, 2 * features, 2, stride=2)
                layers.append(nn.Sequential(ChannelNorm(features, eps=1e-6), down))
                features *= 2
            layers.append(nn.Sequential(*[TorchvisionConvNeXtBlock(features) for _ in range(blocks)]))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(ChannelNorm(features, eps=1e-6), nn.Flatten(1), linear(features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))


class Mlp(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.fc1, self.fc2 = linear(features, 4 * features), linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TimmConvNeXtBlock(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(features, features, 7, padding=3, groups=features)
        self.norm, self.mlp = nn.LayerNorm(features, eps=1e-6), Mlp(features)
        self.gamma = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + y * self.gamma.reshape(1, -1, 1, 1)


class TimmConvNeXt(nn.Module):
    def __init__(self, num_classes=1000, stage_sizes=(3, 3, 9, 3), features=96):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, features, 4, stride=4), ChannelNorm(features, eps=1e-6))
        self.stages = nn.Sequential()
        for index, blocks in enumerate(stage_sizes):
            stage = nn.Module()
            stage.downsample = nn.Identity()
            if index:
                down = nn.Conv2d(features, 2 * features, 2, stride=2)
                stage.downsample = nn.Sequential(ChannelNorm(features, eps=1e-6), down)
                features *= 2
            stage.blocks = nn.Sequential(*[TimmConvNeXtBlock(features) for _ in range(blocks)])
            self.stages.append(stage)
        self.head = nn.Module()
        self.head.norm, self.head.fc = ChannelNorm(features, eps=1e-6), linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage.blocks(stage.downsample(x))
        return self.head.fc(self.head.norm(x.mean((2, 3), keepdim=True)).flatten(1))


class Attention(nn.Module):
    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = linear(features, 3 * features), linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, features = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(features // self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, features))


class TransformerBlock(nn.Module):
    def __init__(self, features: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(features, eps=1e-6), Attention(features, heads)
        self.norm2, self.mlp = nn.LayerNorm(features, eps=1e-6), Mlp(features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """timm's, which takes positions resized as it does with `dynamic_img_size`."""

    def __init__(self, num_classes=1000, depth=12, heads=6, side=224):
        super().__init__()
        features, self.grid = 64 * heads, side // 16
        self.cls_token = nn.Parameter(torch.zeros(1, 1, features))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, features))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, features, 16, stride=16)
        self.blocks = nn.Sequential(*[TransformerBlock(features, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.head = linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x)
        first, maps = self.pos_embed[:, :1], self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid))
        maps = maps.permute(0, 3, 1, 2)
        if maps.shape[2:] != x.shape[2:]:
            maps = F.interpolate(maps, x.shape[2:], mode="bicubic", antialias=True)
        x = (x + maps).flatten(2).transpose(1, 2)
        x = torch.cat([(self.cls_token + first).expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])
