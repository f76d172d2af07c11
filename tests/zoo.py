"""Models of torchvision and timm, and what must hold of every one of them.

`check` is the definition: training with the channels that exist is masked training, the thin
network is the selection, and the cost is what torch counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dcx_kernels as dcx
from dcx_kernels.graph.shrink import shrink_
from networks import random_sets
from tolerances import assert_gradients_close

__all__ = ["TIMM", "TORCHVISION", "Case", "check", "outputs", "torchvision_names"]


class Case(NamedTuple):
    """One model: how it is made, and the images it gets.

    Attributes:
        make: returns it, narrow or shallow where its class has options for that.
        size: height and width; batch norms need several values per channel in the last stage.
        grouped: it has grouped convolutions (besides depthwise ones).
        quick: with ``union`` it is checked in every test run; all else in the slow ones.
    """

    make: Callable[[], nn.Module]
    size: int = 64
    batch: int = 4
    grouped: bool = False
    quick: bool = False

    def policies(self) -> Iterator[tuple[str, str]]:
        """Return every (residual, grouped) that makes a difference."""
        for residual in ("keep", "tie", "union"):
            for grouped in ("keep", "equal") if self.grouped else ("keep",):
                yield residual, grouped


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=5, **options)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=5, **options)
        return model

    return make


def _with_narrow_classifier(name: str) -> Callable[[], nn.Module]:
    """AlexNet's and VGG's classifier has a hundred million weights and no option for fewer."""

    def make() -> nn.Module:
        model = torchvision.models.get_model(name, num_classes=5)
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        first, second, last = (model.get_submodule(n) for n in linear)
        shrink_(
            model, {linear[0]: (first.in_features, 32), linear[1]: (32, 32), linear[2]: (32, 5)}
        )
        for layer in (first, second, last):
            layer.reset_parameters()
        return model

    return make


def _tiny_resnext() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], 5, groups=4, width_per_group=4)


def _tiny_densenet() -> nn.Module:
    return torchvision.models.DenseNet(4, (2, 3), 10, bn_size=2, num_classes=5)


def _tiny_shufflenet() -> nn.Module:
    return torchvision.models.ShuffleNetV2([1, 2, 1], [8, 20, 28, 36, 40], 5)


def _tiny_convnext() -> nn.Module:
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([setting(8, 16, 1), setting(16, None, 1)], num_classes=5)


TORCHVISION: dict[str, Case] = {
    "tiny_resnext": Case(_tiny_resnext, grouped=True, quick=True),
    "tiny_densenet": Case(_tiny_densenet, quick=True),
    "tiny_shufflenet": Case(_tiny_shufflenet, quick=True),
    "tiny_convnext": Case(_tiny_convnext, quick=True),
    "tiny_mobilenet_v3": Case(_torchvision("mobilenet_v3_small", width_mult=0.25), quick=True),
    "alexnet": Case(_with_narrow_classifier("alexnet")),
    "vgg11": Case(_with_narrow_classifier("vgg11")),
    "vgg11_bn": Case(_with_narrow_classifier("vgg11_bn")),
    "resnet18": Case(_torchvision("resnet18")),
    "resnet50": Case(_torchvision("resnet50")),
    "resnext50_32x4d": Case(_torchvision("resnext50_32x4d"), grouped=True),
    "wide_resnet50_2": Case(_torchvision("wide_resnet50_2")),
    "densenet121": Case(_torchvision("densenet121")),
    "googlenet": Case(_torchvision("googlenet", init_weights=False), size=96),
    "inception_v3": Case(_torchvision("inception_v3", init_weights=False, aux_logits=False), 128),
    "squeezenet1_0": Case(_torchvision("squeezenet1_0")),
    "squeezenet1_1": Case(_torchvision("squeezenet1_1")),
    "mobilenet_v2": Case(_torchvision("mobilenet_v2")),
    "mobilenet_v3_small": Case(_torchvision("mobilenet_v3_small")),
    "mobilenet_v3_large": Case(_torchvision("mobilenet_v3_large")),
    "mnasnet0_5": Case(_torchvision("mnasnet0_5")),
    "shufflenet_v2_x0_5": Case(_torchvision("shufflenet_v2_x0_5")),
    "shufflenet_v2_x1_0": Case(_torchvision("shufflenet_v2_x1_0")),
    "efficientnet_b0": Case(_torchvision("efficientnet_b0")),
    "efficientnet_v2_s": Case(_torchvision("efficientnet_v2_s")),
    "regnet_x_400mf": Case(_torchvision("regnet_x_400mf"), grouped=True),
    "regnet_y_400mf": Case(_torchvision("regnet_y_400mf"), grouped=True),
    "convnext_tiny": Case(_torchvision("convnext_tiny"), batch=2),
    "fcn_resnet50": Case(_torchvision("fcn_resnet50", weights_backbone=None, aux_loss=True)),
    "deeplabv3_mobilenet_v3_large": Case(
        _torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None, aux_loss=True)
    ),
    "lraspp_mobilenet_v3_large": Case(
        _torchvision("lraspp_mobilenet_v3_large", weights_backbone=None)
    ),
}

# per family (module of timm) one or two of its models, the smaller ones
_TIMM_QUICK = ("test_resnet", "test_efficientnet", "test_byobnet", "test_nfnet")
_TIMM_GROUPED = (
    "res2next50",
    "dpn68",
    "seresnext26d_32x4d",
    "regnetx_002",
    "legacy_seresnext26_32x4d",
)
# 64x64 leaves so few values per channel that even the masked network, given an image that differs
# by one rounding, differs by more than the tolerance after three steps
_TIMM_SIZES = {"fbnetc_100": 96, "mobileone_s0": 96, "selecsls42": 96}
_TIMM_NAMES = """
test_resnet test_efficientnet test_byobnet test_nfnet test_convnext test_convnext2 test_convnext3
test_efficientnet_gn test_efficientnet_evos test_efficientnet_ln test_mambaout darknet17
cspresnet50 cs3darknet_s densenetblur121d dla34 dla46_c dpn68 ese_vovnet19b_slim
ese_vovnet19b_slim_dw resnet10t resnet18d ecaresnet26t seresnext26d_32x4d resnetblur18 resnetaa34d
gcresnet33ts mixnet_s tinynet_e efficientnet_lite0 tf_efficientnet_b0 tf_mixnet_s mnasnet_050
semnasnet_075 fbnetc_100 mobilenetv1_100 mobilenetv4_conv_small_035 lcnet_035
mobilenetv3_small_050 fasternet_t0 ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a
hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_atto legacy_seresnet18
legacy_seresnext26_32x4d legacy_xception rdnet_tiny regnetx_002 regnety_002 regnetz_005
repghostnet_050 repvit_m0_9 repvgg_a0 mobileone_s0 gernet_s res2net50d res2next50 resnest14d
resnetv2_18 resnetv2_50d_gn rexnet_100 rexnetr_100 selecsls42 shvit_s1 skresnet18 starnet_s050
swiftformer_xs tresnet_m vgg11_bn xception41 convnext_atto convnextv2_atto poolformer_s12
fastvit_t8 mobilevit_xxs efficientvit_b0 nf_resnet26 nfnet_l0 nf_regnet_b0
"""

TIMM: dict[str, Case] = {
    name: Case(
        _timm(name),
        _TIMM_SIZES.get(name, 64),
        grouped=name in _TIMM_GROUPED,
        quick=name in _TIMM_QUICK,
    )
    for name in _TIMM_NAMES.split()
}


def torchvision_names() -> list[str]:
    """Name every convolutional classifier and every segmentation model of torchvision."""
    models = torchvision.models
    attention = ("vit", "swin", "maxvit")
    names = [n for n in models.list_models(module=models) if not n.startswith(attention)]
    return names + models.list_models(module=models.segmentation)


def prepared(model: nn.Module) -> nn.Module:
    """Return the model in float64, without randomness, with norms that are not the identity.

    Both executions must agree on every number, and a fresh norm hides mistakes: a bias of zero is
    right in any order.
    """
    for module in model.modules():
        for rate in ("p", "drop_rate"):  # dropout, stochastic depth
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5  # three steps are to be seen in the running statistics
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            for vector, low in ((module.weight, 0.5), (module.bias, -0.5)):
                if vector is not None:
                    nn.init.uniform_(vector, low, low + 1.0)
    return model.double()


def outputs(y: Any) -> dict[str, Tensor]:
    """Return all tensors a model returns, by name: logits, auxiliary heads, features."""
    if isinstance(y, Tensor):
        return {"y": y}
    items = y.items() if isinstance(y, dict) else enumerate(y)
    return {f"{k}.{name}": t for k, v in items if v is not None for name, t in outputs(v).items()}


def _loss(y: Any) -> Tensor:
    """A loss whose gradient has both signs and no symmetry."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in outputs(y).values():
        ramp = torch.linspace(-1, 1, tensor[0].numel(), dtype=tensor.dtype).view(tensor.shape[1:])
        total = total + (tensor * ramp).mean() + (tensor**2).mean() / 10
    return total


def check(case: Case, residual: str, grouped: str, steps: int = 3) -> dcx.ChannelModel:
    """Train sparse and masked with sets that change, and compare everything; then cut and count.

    Returns:
        the sparse model, for what a test wants to know besides.
    """
    torch.manual_seed(0)
    dense = prepared(case.make())
    x = torch.randn(case.batch, 3, case.size, case.size, dtype=torch.float64)
    options: dict[str, Any] = {"residual": residual, "grouped": grouped, "saliency": "sample"}
    sparse = dcx.convert(dense, x, **options)
    masked = dcx.convert(dense, x, execution="mask", **options)
    assert sparse.groups == masked.groups
    models = (sparse, masked)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in models]
    for _ in range(steps):
        sets = random_sets(sparse)
        seen = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.set_active(sets)
            optimizer.zero_grad()
            y = model(x)
            _loss(y).backward()
            optimizer.step()
            seen.append((outputs(y), model.saliency("batch"), model.saliency("sample")))
        for ours, expected in zip(*seen, strict=True):
            if expected:
                assert_gradients_close(ours, expected)
    assert_gradients_close(_floats(sparse.state_dict()), _floats(masked.state_dict()))
    _check_evaluation(sparse, masked, x)
    return sparse


def _check_evaluation(sparse: dcx.ChannelModel, masked: dcx.ChannelModel, x: Tensor) -> None:
    sparse.eval()
    masked.eval()
    thin = dcx.compact(sparse)
    with torch.no_grad():
        expected = outputs(masked(x))
        assert_gradients_close(outputs(sparse(x)), expected)
        with FlopCounterMode(display=False) as counter:
            assert_gradients_close(outputs(thin(x)), expected)
    cost = dcx.cost(sparse)
    assert cost.macs == counter.get_total_flops() // 2 // x.shape[0]
    assert cost.params == sum(p.numel() for p in thin.parameters())


def _floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if t.is_floating_point()}
