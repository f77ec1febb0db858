"""Networks by name. A new architecture is one file here and one line in `REGISTRY`."""

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.models.convnext import ConvNeXt
from ftwt_jax.models.densenet import DenseNet
from ftwt_jax.models.efficientnet import EfficientNet
from ftwt_jax.models.inception import InceptionV3, InceptionV4
from ftwt_jax.models.mobilenet import MobileNetV1, MobileNetV2
from ftwt_jax.models.resnet import ResNet
from ftwt_jax.models.vgg import PLANS, POOL, VGG
from ftwt_jax.models.vit import ViT

STEMS = ("cifar", "imagenet")

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "vgg_bn": VGG,
    **{name: functools.partial(VGG, plan=plan) for name, plan in PLANS.items()},
    "resnet18": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2)),
    "resnet34": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3)),
    "resnet50": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), bottleneck=True),
    "resnet101": functools.partial(ResNet, stage_sizes=(3, 4, 23, 3), bottleneck=True),
    "resnet152": functools.partial(ResNet, stage_sizes=(3, 8, 36, 3), bottleneck=True),
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "densenet121": DenseNet,
    "inception_v3": InceptionV3,
    "inception_v4": InceptionV4,
    "efficientnet_b0": EfficientNet,
    "convnext_tiny": ConvNeXt,
    "vit_small_patch16": ViT,
}
# Names of 6n+2 layers that mean another network to others; these networks are not here.
AMBIGUOUS = {
    "resnet26": "one of bottlenecks for large images",
    "resnet164": "one of bottlenecks for small images",
    "resnet200": "one of bottlenecks for large images",
}
# What a caller may set besides `num_classes` and `gates`; the architecture decides everything else.
OPTIONS = ("width", "stem", "plan", "dtype")


def _cifar_resnet(name: str) -> Callable[..., nn.Module] | None:
    """ResNet-(6n+2) for names such as "resnet56", with 16, 32 and 64 filters; None for other names."""
    match = re.fullmatch(r"resnet([1-9]\d*)", name)
    depth = int(match.group(1)) if match else 0
    if depth < 8 or depth % 6 != 2:
        return None
    blocks = (depth - 2) // 6
    return functools.partial(ResNet, stage_sizes=(blocks,) * 3, features=16, projection=False, stem="cifar")


def _options(name: str, build: Callable[..., nn.Module]) -> list[str]:
    fields = inspect.signature(build.func if isinstance(build, functools.partial) else build).parameters
    fixed = {"stem"} if is_cifar_resnet(name) and name not in AMBIGUOUS else set()
    return [option for option in OPTIONS if option in fields and option not in fixed]


def is_cifar_resnet(name: str) -> bool:
    """Whether a name is that of a network for small images, whatever else is said."""
    return name not in REGISTRY and _cifar_resnet(name) is not None


def options_of(name: str) -> list[str]:
    """What `create_model` takes for a network besides classes and gates; an empty list for an unknown name."""
    build = REGISTRY.get(name) or _cifar_resnet(name)
    return [] if build is None else _options(name, build)


def create_model(name: str, num_classes: int, gates: GateConfig | None = None, **arch: Any) -> nn.Module:
    """Builds a network, dense or gated, from one definition.

    `model.apply(variables, images, train=False, control=None)` takes images [N, H, W, channels] and returns `Outputs`;
    with `train=True` add `mutable=["batch_stats"]`, as for any Linen module with batch norm.

    Args:
      name: `vgg11_bn` to `vgg19_bn`, `vgg_bn` (needs `plan`), `resnet18`, `resnet34`, `resnet50`, `resnet101`,
        `resnet152`, any other `resnet(6n+2)`, those of CIFAR, such as `resnet56`, `mobilenet_v1`, `mobilenet_v2`; for
        images as large as ImageNet's alone `densenet121`, `inception_v3`, `inception_v4`, `efficientnet_b0`,
        `convnext_tiny`, `vit_small_patch16`.
      num_classes: number of logits.
      gates: settings of the gates; None: the dense network. Parameters have the same names in both; the gated network
        only adds its heads.
      **arch: `width` (multiplier of all filters); `stem` (`cifar` or `imagenet`; ResNet-18 to -152 default to
        `imagenet`, MobileNets to `cifar`; a 6n+2 whose name others give to another network needs `cifar`; MobileNetV2
        also takes `published`, the CIFAR network of the authors' code); `plan` (VGG: filters per unit, "M" for a pool);
        `dtype` of the computation.

    Raises:
      UserError: unknown name or option, or a value outside its range.
    """
    build = REGISTRY.get(name) or _cifar_resnet(str(name))
    if build is None:
        raise unknown_name("network", name, [*REGISTRY, "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"])
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)) or num_classes < 1:
        raise UserError(f"num_classes must be a positive whole number; got {num_classes!r}")
    if gates is not None and not isinstance(gates, GateConfig):
        raise UserError(f"gates must be a GateConfig or None; got {type(gates).__name__}")
    if name in AMBIGUOUS and arch.get("stem") != "cifar":
        raise UserError(
            f"{name} means two networks: set stem='cifar' for that of CIFAR, with 16, 32 and 64 filters; the other, "
            f"{AMBIGUOUS[name]}, is not here, but resnet50, resnet101 and resnet152 are"
        )
    if arch.get("stem") == "cifar" and (name in ("vgg_bn", *PLANS) or is_cifar_resnet(name)):
        del arch["stem"]  # The only stem that these networks have.
    for option in arch:
        if option not in _options(name, build):
            raise unknown_name(f"{name} option", option, _options(name, build))
    stems = (*STEMS, "published") if name == "mobilenet_v2" else STEMS
    if "stem" in arch and arch["stem"] not in stems:
        raise unknown_name("stem", arch["stem"], stems)
    width = arch.get("width", 1.0)
    if not isinstance(width, (int, float, np.number)) or not 0 < width < math.inf:
        raise UserError(f"width multiplies the number of filters and must be positive and finite; got {width!r}")
    if "plan" in arch:
        arch["plan"] = _check_plan(arch["plan"])
    elif name == "vgg_bn":
        raise UserError("vgg_bn needs a plan, the filters of each unit and 'M' for a pool: plan=(16, 'M', 32, 'M')")
    return build(num_classes=int(num_classes), gates=gates, **arch)


def _check_plan(plan: Any) -> tuple[int | str, ...]:
    if not isinstance(plan, (tuple, list)):
        raise UserError(f"a VGG plan is a sequence such as (16, 'M', 32, 'M'); got {plan!r}")
    for step in plan:
        if step != POOL and (isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 1):
            raise UserError(f"a VGG plan holds numbers of filters and 'M' for a pool; got {step!r} in {plan}")
    if all(step == POOL for step in plan):
        raise UserError("a VGG plan needs at least one unit")
    return tuple(step if step == POOL else int(step) for step in plan)
