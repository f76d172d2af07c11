"""What convert finds in a network, keeps of it, and refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.models import vgg16, vgg19
from networks import NETWORKS, Chain, Residual, batch, random_sets
from tolerances import assert_exact, assert_gradients_close

IMAGE = torch.zeros(2, 3, 32, 32)


def test_convert_finds_the_groups_of_vgg19() -> None:
    model = dcx.convert(vgg19(), IMAGE)
    selectable = {name: g for name, g in model.groups.items() if g.selectable}
    assert len(selectable) == 16
    assert sum(g.num_channels for g in selectable.values()) == 5504  # DCE: "20 % ... 1100"
    assert all(name.startswith("features.") for name in selectable)
    first = model.groups["features.0"]
    assert [m[:2] for m in first.members] == [
        ("features.0", "producer"),
        ("features.1", "norm"),
        ("features.3", "consumer"),
    ]
    assert model.groups["classifier"].reason == "output of the network"


def test_convert_keeps_what_has_no_rule_full_with_a_reason() -> None:
    model = dcx.convert(Residual(), torch.zeros(2, 3, 9, 9))
    reasons = {name: group.reason for name, group in model.groups.items()}
    assert reasons["stem.0"] == reasons["back"] == "residual add (residual='keep')"
    assert "grouped" in reasons["grouped"]
    assert [name for name, group in model.groups.items() if group.selectable] == [
        "inside.0",
        "free",
    ]


@pytest.mark.parametrize("execution", ["sparse", "mask"])
@pytest.mark.parametrize("network", list(NETWORKS))
def test_convert_keeps_the_state_dict_and_leaves_the_model_alone(
    network: str, execution: str
) -> None:
    dense, x, t = batch(network)
    before = copy.deepcopy(dense.state_dict())
    model = dcx.convert(dense, x, execution=execution)
    assert list(model.state_dict()) == list(before)
    F.cross_entropy(model(x), t).backward()
    for name, tensor in dense.state_dict().items():
        assert_exact(tensor, before[name], name)
    assert all(p.grad is None for p in dense.parameters())
    model.load_state_dict(before)
    dense.load_state_dict(model.state_dict())


@pytest.mark.parametrize("execution", ["sparse", "mask"])
def test_revert_returns_the_dense_architecture_with_full_weights(execution: str) -> None:
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x, execution=execution)
    optimizer = dcx.optim.SGD(model, lr=0.1)
    model.set_active(random_sets(model))
    F.cross_entropy(model(x), t).backward()
    optimizer.step()
    back = dcx.revert(model)
    assert type(back) is type(dense)
    for name, tensor in model.state_dict().items():
        assert_exact(back.state_dict()[name], tensor, name)
    model.set_active({n: dcx.ChannelSet.full(s.num_channels) for n, s in model.active.items()})
    assert_gradients_close({"y": back.eval()(x).detach()}, {"y": model.eval()(x).detach()})


def test_train_and_eval_are_different_graphs_of_one_module() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(F.dropout(self.a(x), 0.5, self.training))
            return (x * 2).mean((2, 3)) if self.training else x.mean((2, 3))

    dense = Switch()
    model = dcx.convert(dense, torch.zeros(1, 3, 4, 4)).eval()
    x = torch.randn(2, 3, 4, 4)
    assert_exact(model(x), dense.eval()(x))
    assert_exact(model(x), model(x))
    assert not torch.equal(model.train()(x), model.train()(x))


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "vgg11_bn", "squeezenet1_0"])
def test_convert_of_torchvision_models_equals_masking(name: str) -> None:
    """The default policy: residual streams stay full, all else is selectable."""
    dense = getattr(torchvision.models, name)(num_classes=5).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    sparse = dcx.convert(dense, x)
    masked = dcx.convert(dense, x, execution="mask")
    sets = random_sets(sparse)
    sparse.set_active(sets)
    masked.set_active(sets)
    assert_gradients_close({"y": sparse(x).detach()}, {"y": masked(x).detach()})
    assert_gradients_close({"y": dcx.compact(sparse)(x).detach()}, {"y": sparse(x).detach()})


def test_a_shared_module_is_one_group_member() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.again(torch.relu(self.first(x))))
            return self.head(torch.relu(self.again(x)).mean((2, 3)))

    dense = Shared().double()
    x, t = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.randint(0, 5, (4,))
    results = []
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        assert [n for n, g in model.groups.items() if g.selectable] == ["first"]
        optimizer = dcx.optim.SGD(model, lr=0.1)
        model.set_active({"first": dcx.ChannelSet([0, 2, 5], 6)})
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        results.append(model.state_dict())
    assert_gradients_close(results[0], results[1])


@pytest.mark.parametrize("execution", ["sparse", "mask"])
def test_deepcopy_is_independent_and_trains_with_torch_optimizers(execution: str) -> None:
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x, execution=execution)
    dcx.optim.SGD(model, lr=0.1)
    model.set_active(random_sets(model))
    twin = copy.deepcopy(model)
    assert_exact(twin.eval()(x), model.eval()(x))
    twin.train()
    twin.set_active(random_sets(twin))
    F.cross_entropy(twin(x), t).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert twin.active != model.active


def test_layers_of_a_converted_model_pickle() -> None:
    model = dcx.convert(vgg16(width=1 / 16), IMAGE)
    layer = model.get_submodule("features.0")
    again = pickle.loads(pickle.dumps(layer))
    assert_exact(again.weight, layer.weight)


class TestErrors:
    """Bad input is refused with a sentence, and changes nothing."""

    @pytest.fixture
    def model(self) -> dcx.ChannelModel:
        return dcx.convert(vgg19(width=1 / 16), IMAGE)

    def test_unknown_group(self, model: dcx.ChannelModel) -> None:
        with pytest.raises(ValueError, match=r"expected a group among .*got 'features.99'"):
            model.set_active({"features.99": dcx.ChannelSet([0], 4)})

    def test_set_of_the_wrong_size_changes_nothing(self, model: dcx.ChannelModel) -> None:
        good = dcx.ChannelSet([1], 4)
        before = model.active
        with pytest.raises(ValueError, match=r"features\.3: expected a set over 4 channels, got 7"):
            model.set_active({"features.0": good, "features.3": dcx.ChannelSet([1], 7)})
        assert model.active == before

    def test_a_kept_group(self, model: dcx.ChannelModel) -> None:
        with pytest.raises(ValueError, match=r"classifier: expected all channels .output of the"):
            model.set_active({"classifier": dcx.ChannelSet([1], 10)})

    def test_a_list_instead_of_a_set(self, model: dcx.ChannelModel) -> None:
        with pytest.raises(TypeError, match=r"features\.0: expected a ChannelSet, got list"):
            model.set_active({"features.0": [0, 1]})  # type: ignore[dict-item]

    def test_saliency_before_backward(self, model: dcx.ChannelModel) -> None:
        with pytest.raises(ValueError, match="expected a backward pass before saliency"):
            model.saliency()

    def test_saliency_that_was_not_measured(self, model: dcx.ChannelModel) -> None:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        with pytest.raises(ValueError, match="expected saliency_reduction = 'sample'"):
            model.saliency("sample")
        model.saliency_reduction = None
        with pytest.raises(ValueError, match="expected saliency_reduction 'batch' or 'sample'"):
            model.saliency()
        with pytest.raises(ValueError, match="got 'mean'"):
            model.saliency_reduction = "mean"  # type: ignore[assignment]

    def test_options(self) -> None:
        with pytest.raises(ValueError, match="execution 'sparse' or 'mask', got 'fast'"):
            dcx.convert(vgg19(width=1 / 16), IMAGE, execution="fast")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="residual 'keep', 'tie' or 'union', got 'cut'"):
            dcx.convert(vgg19(width=1 / 16), IMAGE, residual="cut")  # type: ignore[arg-type]

    def test_example_inputs_that_do_not_fit(self) -> None:
        for wrong, message in (
            (torch.zeros(2, 4, 32, 32), r"features\.0: expected example inputs .*\(2, 4, 32, 32\)"),
            (torch.zeros(2, 3, 8, 8), r"expected example inputs .*\(2, 3, 8, 8\)"),
        ):
            with pytest.raises(ValueError, match=message):
                dcx.convert(vgg19(width=1 / 16), wrong)
        with pytest.raises(TypeError, match="expected tensors as example inputs, got str"):
            dcx.convert(vgg19(width=1 / 16), "image")  # type: ignore[arg-type]

    def test_converted_twice(self, model: dcx.ChannelModel) -> None:
        with pytest.raises(TypeError, match=r"expected a dense torch.nn.Module, got ChannelModel"):
            dcx.convert(model, IMAGE)

    def test_nothing_to_select(self) -> None:
        model = dcx.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), IMAGE)
        with pytest.raises(ValueError, match=r"0: expected all channels .output of the network"):
            model.set_active({"0": dcx.ChannelSet([1], 4)})

    def test_untraceable(self) -> None:
        class Branch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x) if x.sum() > 0 else x

        with pytest.raises(ValueError, match=r"Branch cannot be traced by torch\.fx"):
            dcx.convert(Branch(), IMAGE)

    def test_functions_of_converted_models_refuse_others(self) -> None:
        for function in (dcx.compact, dcx.revert):
            with pytest.raises(TypeError, match="expected a model made by convert, got Chain"):
                function(Chain())
        with pytest.raises(ValueError, match="cost: expected example_inputs"):
            dcx.cost(Chain())
