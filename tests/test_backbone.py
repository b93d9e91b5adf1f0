"""Backbones against torchvision's own reading of its networks, and the traps of freezing."""

import json
import re
from itertools import accumulate
from operator import mul
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from detr_nb.backbone import (
    BasicBlock,
    ResNet,
    TinyBackbone,
    append_coordinates,
    imagenet_weights,
    resnet_body,
)
from detr_nb.optimizer import parameter_groups

DATA = Path(__file__).parent / "data"
STAGES = ("layer1", "layer2", "layer3", "layer4")
LARGE = [("resnet34", False), ("resnet50", False), ("resnet50", True)]


def shake_norms(net):
    """Statistics far from 0 and 1, with which the features of a deep random network keep a moderate size."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d):
            m.weight.data.uniform_(0.4, 0.8)
            m.running_var.uniform_(0.5, 3)
            for tensor in (m.bias.data, m.running_mean):
                tensor.uniform_(-1, 1)
    return net


def body_state(net):
    return {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}


# --- ResNet -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "dilation"),
    [("resnet18", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)],
)
def test_resnet_equals_torchvisions_features(name, dilation):
    options = {"replace_stride_with_dilation": [False, False, True]} if dilation else {}
    theirs = shake_norms(get_model(name, weights=None, **options)).eval()
    ours = ResNet(name, dilation=dilation, pretrained=False)
    ours.body.load_state_dict(body_state(theirs))
    images = torch.randn(2, 3, 75, 130)
    with torch.no_grad():
        expected = list(IntermediateLayerGetter(theirs, dict(zip(STAGES, STAGES, strict=True)))(images).values())
        for mode in (True, False):
            assert_close(ours.train(mode)(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize("dilation", [False, True])
def test_widths_and_strides_are_true(name, dilation):
    if dilation and name in ("resnet18", "resnet34"):
        with pytest.raises(ValueError, match="basic blocks"):
            ResNet(name, dilation=True, pretrained=False)
        return
    with torch.device("meta"):
        net = ResNet(name, dilation=dilation, pretrained=False)
        features = net(torch.empty(1, 3, 192, 320))
    assert net.channels == net.widths[-1] and len(features) == len(net.widths) == len(net.strides) == 4
    for f, width, stride in zip(features, net.widths, net.strides, strict=True):
        assert f.shape == (1, width, 192 // stride, 320 // stride)


def test_state_dict_has_the_official_layout():
    rows = json.loads((DATA / "detr_r50.json").read_text())["state"]
    prefix = "backbone.0.body."
    official = {name.removeprefix(prefix): tuple(shape) for name, shape, *_ in rows if name.startswith(prefix)}
    with torch.device("meta"):
        state = ResNet("resnet50", pretrained=False).body.state_dict()
    ours = {name: tuple(value.shape) for name, value in state.items()}
    assert len(official) == 265 and ours == official


def test_frozen_means_frozen_through_a_training_step():
    net = shake_norms(ResNet("resnet18", pretrained=False)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    net(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
    optimiser.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    later = ("body.layer2", "body.layer3", "body.layer4")
    learning = {name for name, _ in net.named_parameters() if name.startswith(later)}
    assert changed == learning
    assert not any("bn" in name for name, _ in net.named_parameters())


def test_trainable_prefixes_choose_what_learns():
    for trainable in ((), ("layer4",), ("conv1", "layer1", "layer2", "layer3", "layer4")):
        net = ResNet("resnet18", pretrained=False, trainable=trainable)
        learning = {name.split(".")[0] for name, p in net.body.named_parameters() if p.requires_grad}
        assert learning == set(trainable)


def test_an_image_in_company_equals_the_image_alone():
    net = shake_norms(ResNet("resnet18", pretrained=False)).train()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        together, alone = net(images), net(images[1:2])
    for a, b in zip(together, alone, strict=True):
        assert_close(a[1:2], b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_dc5_holds_the_plain_features_at_every_second_cell():
    plain, dc5 = (shake_norms(ResNet("resnet50", dilation, pretrained=False)) for dilation in (False, True))
    dc5.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 97, 160)  # odd grids, too
    with torch.no_grad():
        assert_close(dc5(images)[-1][..., ::2, ::2], plain(images)[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v2", "ResNet50", ""])
def test_other_networks_are_refused(name):
    with pytest.raises(ValueError, match="ResNets"):
        resnet_body(name)


# --- weights ------------------------------------------------------------------------------------------------------
@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Torchvision's cache in a fresh folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("error", [URLError("offline"), TimeoutError("slow"), PermissionError("read-only")])
def test_without_weights_the_error_names_the_remedy(empty_cache, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(RuntimeError) as raised:
        ResNet("resnet50", pretrained=True)
    words = str(raised.value)
    assert "resnet50-0676ba61.pth" in words  # the first version, as DETR
    assert str(empty_cache) in words and "pretrained=False" in words and "pretrained_backbone=False" in words


def test_the_remedy_works(empty_cache, monkeypatch):
    monkeypatch.setattr("torch.hub.download_url_to_file", None)  # must not be called
    saved = shake_norms(get_model("resnet18", weights=None))
    empty_cache.mkdir(parents=True)
    torch.save(saved.state_dict(), empty_cache / "resnet18-f37072fd.pth")
    assert not any(key.startswith("fc.") for key in imagenet_weights("resnet18"))
    net = ResNet("resnet18", pretrained=True)
    assert_close(net.body.state_dict(), {k: v for k, v in body_state(saved).items() if "num_batches" not in k})


# --- TinyBackbone -------------------------------------------------------------------------------------------------
@given(
    y=st.integers(8, 70), x=st.integers(8, 70), widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    coordinates=st.booleans(), data=st.data(),
)
@settings(max_examples=25)
def test_tiny_grids(y, x, widths, coordinates, data):
    steps = data.draw(st.lists(st.sampled_from([1, 2]), min_size=len(widths) - 1, max_size=len(widths) - 1))
    strides = tuple(accumulate(steps, mul, initial=4))
    net = TinyBackbone(tuple(widths), strides, coordinates).eval()
    features = net(torch.randn(2, 3, y, x))
    assert net.strides == strides and net.channels == widths[-1]
    for f, width, stride in zip(features, widths, strides, strict=True):
        assert f.shape == (2, width, -(-(y // 4) // (stride // 4)), -(-(x // 4) // (stride // 4)))


@pytest.mark.parametrize("strides", [(4, 8), (8, 16, 32), (4, 6, 8), (4, 8, 4)])
def test_impossible_strides_are_refused(strides):
    with pytest.raises(ValueError, match=re.escape(str(strides))):
        TinyBackbone(strides=strides)


def test_tiny_moves_with_the_picture():
    net = shake_norms(TinyBackbone((8, 8, 8))).eval()
    wide = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        here, there = (net(wide[..., start : start + 224, start : start + 224])[-1] for start in (0, 16))
    inner = slice(4, -5)  # cells that see no border in either crop
    assert_close(here[..., 5:-4, 5:-4], there[..., inner, inner], rtol=1e-4, atol=1e-4)


def test_tiny_coordinates_break_the_tie_of_a_plain_wrapped_image():
    torch.manual_seed(0)
    for coordinates in (False, True):
        net = TinyBackbone(coordinates=coordinates).eval()
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                m.padding_mode = "circular"
        spread = net(torch.ones(1, 3, 64, 64))[-1].std((2, 3)).max()
        assert spread > 1e-3 if coordinates else spread < 1e-5


def test_basic_block_equals_the_block_of_torchvision():
    from torchvision.models.resnet import BasicBlock as Theirs

    for stride, width in ((1, 8), (2, 8), (1, 12), (2, 12)):
        ours = shake_norms(BasicBlock(8, width, stride)).eval()
        same = isinstance(ours.short, nn.Identity)
        theirs = Theirs(8, width, stride, None if same else ours.short).eval()
        theirs.conv1, theirs.conv2, theirs.bn1, theirs.bn2 = ours.conv1, ours.conv2, ours.norm1, ours.norm2
        x = torch.randn(2, 8, 9, 10)
        assert_close(ours(x), theirs(x))


@given(b=st.integers(1, 3), y=st.integers(1, 9), x=st.integers(1, 9))
def test_append_coordinates_equals_numpy(b, y, x):
    images = torch.randn(b, 3, y, x, dtype=torch.float64)
    expected = np.zeros((b, 5, y, x))
    expected[:, :3] = images.numpy()
    for i in range(y):
        expected[:, 3, i] = -1 + (2 * i / (y - 1) if y > 1 else 0)
    for j in range(x):
        expected[:, 4, :, j] = -1 + (2 * j / (x - 1) if x > 1 else 0)
    assert_close(append_coordinates(images), torch.from_numpy(expected))


# --- parameter groups ---------------------------------------------------------------------------------------------
class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = nn.Module()
        self.memory.backbone, self.memory.project = TinyBackbone((4, 8), (4, 8)), nn.Conv2d(8, 4, 1)
        self.backbone_scale = nn.Parameter(torch.ones(1))  # not *in* a backbone
        self.head = nn.Linear(4, 2)


@given(
    frozen=st.sets(st.integers(0, 30)), lr=st.sampled_from([1, 1e-4]), lr_backbone=st.sampled_from([0, 0.0, 1e-5, 1])
)
def test_groups_are_a_partition_of_what_learns(frozen, lr, lr_backbone):
    model = Detector()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i not in frozen)
    groups = parameter_groups(model, lr, lr_backbone)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in learning.items()}
    found = [names[id(p)] for g in groups for p in g["params"]]
    assert sorted(found) == sorted(learning)
    for g in groups:
        assert g["params"] and g["lr"] == {"rest": lr, "backbone": lr_backbone}[g["name"]]
        assert all(names[id(p)].startswith("memory.backbone.") == (g["name"] == "backbone") for p in g["params"])
    assert lr_backbone or not any(p.requires_grad for p in model.memory.backbone.parameters())


def test_groups_of_a_shared_parameter_hold_it_once():
    model = Detector()
    model.tied = model.head
    held = [id(p) for g in parameter_groups(model, 1e-4, 1e-5) for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))


def test_frozen_backbone_gathers_no_gradient():
    model = Detector()
    optimiser = torch.optim.AdamW(parameter_groups(model, 1e-4, 0), lr=1e-4)
    features = model.memory.backbone(torch.randn(2, 3, 16, 16))[-1]
    model.head(model.memory.project(features).mean((2, 3))).sum().backward()
    optimiser.step()
    assert all(p.grad is None for p in model.memory.backbone.parameters())
    assert [g["name"] for g in optimiser.param_groups] == ["rest"]
