"""What travels with a model: its description and its way in for pictures, to a folder, to the hub and back."""

import hashlib
import json
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official import DATA, Reference, official_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

import detr_nb
from detr_nb.backbone import ResNet, TinyBackbone
from detr_nb.data import IMAGENET_MEAN, IMAGENET_STD, Preprocess, normalise
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.formats import VocDataset
from detr_nb.hub import model_config
from detr_nb.loading import MemoryDataset, ShapesData, in_memory
from detr_nb.model import (
    DETR,
    DETRDemo,
    TinyModel,
    detr,
    detr_resnet18,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_tiny,
    postprocess,
)
from detr_nb.notation import Output
from detr_nb.positions import LearnedPositions
from detr_nb.pretrained import (
    PUBLISHED,
    load_pretrained,
    predict_image,
    pretrained_model,
)
from detr_nb.runs import Run, save_run
from detr_nb.shapes import DEFAULT, Scenes
from detr_nb.training import TrainConfig, create_run

pytestmark = pytest.mark.slow  # a model is built and a file written in nearly every test; test_cli has a quick one

BCCD = DATA / "bccd"
close = torch.testing.assert_close
exactly = partial(close, atol=0, rtol=0)
SIZES = {"num_queries": 7, "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 48}
RESNET = {"num_classes": 5, "pretrained_backbone": False, **SIZES}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def bytes_of(height: int, width: int) -> Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def output(model: nn.Module) -> Output:
    with torch.no_grad():
        return model(noise(2, 3, 64, 96))


def stirred(model: DETR) -> DETR:
    """Statistics of norms as after training, and everything that travels set to something unusual."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        if name.endswith("running_var"):
            value.copy_(1 + torch.rand(value.shape, generator=generator))
    count = model.decoder.head.classes.out_features - 1
    model.names, model.category_ids = [f"Käfer {i}" for i in range(count)], [3 * i + 1 for i in range(count)]
    model.preprocess, model.threshold = Preprocess(96, 160, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), (64, 80)), 0.25
    return model.eval()


# --- Preprocess ---------------------------------------------------------------------------------------------------
def official_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """The rule of the authors' transforms, re-derived."""
    height, width = size
    if max(size) / min(size) * short > longest:
        short = int(round(longest * min(size) / max(size)))
    if width < height:
        return int(short * height / width), short
    return (short, int(short * width / height)) if height < width else (short, short)


sides = st.integers(20, 300)


@given(sides, sides, st.integers(16, 200), st.integers(1, 3))
def test_a_picture_is_prepared_as_the_authors_and_torchvision_do(height, width, short, factor):
    image, rule = bytes_of(height, width), Preprocess(short, short * factor)
    size = official_size((height, width), short, short * factor)
    expected = tv.normalize(tv.resize(image, list(size)) / 255, IMAGENET_MEAN, IMAGENET_STD)
    close(rule(image), expected, atol=1e-5, rtol=0)


def test_a_picture_of_the_right_size_is_only_normalised():
    for rule in (Preprocess(128, 128), Preprocess(size=(128, 128))):
        exactly(rule(bytes_of(128, 128)), normalise(bytes_of(128, 128)))


def test_a_fixed_size_stretches_as_a_dataset_in_memory_does():
    photographs = VocDataset(BCCD, "trainval")
    dataset = in_memory(photographs, (60, 80))
    assert dataset.preprocess == Preprocess(size=(60, 80))
    for i, (image, _) in enumerate(photographs):
        exactly(dataset.preprocess(image), normalise(dataset.images[i]))


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (16, 16)])
def test_a_dataset_in_memory_knows_its_frame(size):
    dataset = MemoryDataset(torch.zeros(2, 3, *size, dtype=torch.uint8), [{}, {}], ["a"])
    assert dataset.preprocess == Preprocess(size=size)
    assert dataset.preprocess(bytes_of(50, 70)).shape == (3, *size)


def test_other_means_and_deviations_are_used():
    rule = Preprocess(32, 32, mean=(0, 0, 0), std=(1, 1, 1))
    close(rule(bytes_of(32, 32)), bytes_of(32, 32) / 255)


@pytest.mark.parametrize("wrong", [
    {"short_side": 0}, {"longest": 0}, {"size": (0, 10)}, {"std": (0, 1, 1)}, {"std": (1, -1, 1)},
])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"(short_side|longest|size\[0\]|std\[\d\]) is (0|-1): it must be"):
        Preprocess(**wrong)


@given(st.builds(Preprocess, sides, sides, size=st.none() | st.tuples(sides, sides)))
def test_a_rule_survives_json(rule):
    assert Preprocess.read(json.loads(json.dumps(asdict(rule)))) == rule


def test_every_build_function_says_how_pictures_come_in():
    for build in (detr_resnet18, DETRDemo):
        assert build(**{"num_classes": 5, "pretrained_backbone": False}).preprocess == Preprocess(800, 1333)
    assert detr_tiny().preprocess == detr_tiny(pretrained=True).preprocess == Preprocess(size=(128, 128))


# --- to a folder and back -----------------------------------------------------------------------------------------
def pre_norm() -> DETR:
    return detr(ResNet("resnet34", pretrained=False), 3, pre_norm=True, temperature=20.5, dropout=0.3, **SIZES)


def with_coordinates() -> DETR:
    return detr(TinyBackbone((8, 16), (4, 16), coordinates=True), 3, **SIZES)


MODELS = {
    "tiny": detr_tiny, "other widths": partial(detr_tiny, widths=(8, 16, 24), strides=(4, 8, 16), nheads=2),
    "resnet18": partial(detr_resnet18, **RESNET), "last layer only": partial(detr_resnet18, **RESNET, aux_loss=False),
    "pre-norm": pre_norm, "coordinates": with_coordinates, "no encoder": partial(detr_tiny, enc_layers=0),
    "one class": partial(detr_tiny, num_classes=1, num_queries=1),
    "dilated": partial(detr_resnet50_dc5, **RESNET), "resnet101": partial(detr_resnet101, **RESNET),
}
LARGE = ("dilated", "resnet101")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in MODELS])


def fresh(name: str = "tiny") -> DETR:
    torch.manual_seed(0)
    return stirred(MODELS[name]())


@every_model
def test_a_saved_model_comes_back_to_the_last_bit(name, tmp_path):
    model = fresh(name)
    model.save_pretrained(tmp_path / "a" / "b")
    before = torch.get_rng_state()
    again = DETR.from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), before), "random numbers were used"
    exactly(output(again), output(model))
    exactly(again.state_dict(), model.state_dict())
    assert model_config(again) == model_config(model) and not again.training
    assert (again.names, again.category_ids) == (model.names, model.category_ids)
    assert (again.preprocess, again.threshold) == (model.preprocess, model.threshold)
    learning = [{n for n, p in one.named_parameters() if p.requires_grad} for one in (model, again)]
    assert learning[0] == learning[1] and learning[0]
    assert not any(value.is_meta for value in (*again.parameters(), *again.buffers()))


def test_what_lies_in_the_folder_needs_no_pickle(tmp_path):
    fresh().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text("utf8"))
    assert config["kind"] == "DETRConfig"
    assert config["backbone"] == {"kind": "TinyConfig", "widths": [32, 64, 128], "strides": [4, 8, 8],
                                  "coordinates": False}
    assert config["names"][5] == "Käfer 5" and config["preprocess"]["size"] == [64, 80]
    assert {"num_queries", "nheads", "temperature", "pre_norm", "aux_loss", "threshold"} <= config.keys()
    card = (tmp_path / "README.md").read_text("utf8")
    assert "library_name: detr_nb" in card and "object-detection" in card


def test_names_may_be_missing(tmp_path):
    detr_tiny().save_pretrained(tmp_path)
    again = DETR.from_pretrained(str(tmp_path))
    assert again.names is None and again.category_ids is None


def test_a_changed_model_is_described_as_it_is(tmp_path):
    model = resize_queries(replace_head(fresh(), 4, keep={0: 5}), 30)
    assert model.preprocess.size == (64, 80) and model.threshold == 0.25, "replace_head forgets names, not sizes"
    model.save_pretrained(tmp_path)
    again = DETR.from_pretrained(tmp_path)
    assert again.decoder.head.classes.out_features == 5 and again.queries.embedding.num_embeddings == 30
    exactly(output(again), output(model))


def test_the_layout_of_a_model_in_training_is_no_obstacle(tmp_path):
    model = fresh().to(memory_format=torch.channels_last)
    assert any(not p.is_contiguous() for p in model.parameters())
    model.save_pretrained(tmp_path)
    exactly(DETR.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_the_type_of_the_numbers_is_kept(tmp_path):
    model = fresh().double()
    model.save_pretrained(tmp_path)
    exactly(DETR.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_describing_a_model_draws_no_random_numbers_and_changes_nothing():
    model = fresh("resnet18").train()
    before, state = torch.get_rng_state(), deepcopy(model.state_dict())
    model_config(model)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    exactly(model.state_dict(), state)


class Other(DETR):
    """A model of another kind."""


def learned_positions(model: DETR) -> None:
    model.memory.positions = LearnedPositions(32)


def other_heads(model: DETR) -> None:
    model.decoder.layers[1].cross.attention.heads = 8


def other_norm(model: DETR) -> None:
    model.encoder.layers[0].feed_step.norm.eps = 1e-3


def other_activation(model: DETR) -> None:
    model.decoder.layers[1].feed_forward[1] = nn.GELU()


def other_kind(model: DETR) -> None:
    model.__class__ = Other


def other_scores(model: DETR) -> None:
    model.scores = torch.sigmoid


def one_part_more(model: DETR) -> None:
    model.memory.extra = nn.Linear(2, 2)


def one_layer_after_the_norm(model: DETR) -> None:
    model.decoder.layers[1].attention_step.pre_norm = True


def a_deeper_class_head(model: DETR) -> None:
    model.decoder.head.classes = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 6))


def other_backbone(model: DETR) -> None:
    model.memory.backbone = nn.Conv2d(3, 512, 32, 32)


def other_stage(model: DETR) -> None:
    model.memory.backbone.body.layer4 = nn.Sequential(nn.Conv2d(256, 512, 3, 2, 1))


STRANGE = {
    learned_positions: "memory.positions is LearnedPositions", other_heads: "decoder.layers.1.cross.attention is",
    other_norm: "encoder.layers.0.feed_step.norm is", other_activation: "decoder.layers.1.feed_forward.1 is",
    other_kind: "the model is Other", other_scores: "scores is", one_part_more: "memory.extra is",
    one_layer_after_the_norm: "decoder.layers.1.attention_step is Residual(pre_norm=True) where",
    a_deeper_class_head: "decoder.head.classes is Sequential", other_backbone: "memory.backbone is Conv2d",
    other_stage: "memory.backbone.body.layer4",
}


@pytest.mark.parametrize("change", STRANGE, ids=lambda change: change.__name__)
def test_a_model_without_words_is_refused_before_anything_is_written(change, tmp_path):
    model = fresh("resnet18")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(model)
    with pytest.raises(ValueError) as caught:
        model.save_pretrained(tmp_path)
    assert STRANGE[change] in str(caught.value) and "state_dict" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("words", [{"names": ["a", "b"]}, {"category_ids": [1]}])
def test_classes_without_a_name_or_an_id_are_refused(words, tmp_path):
    model = fresh()
    for name, value in words.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=f"{next(iter(words))} must have one entry for each of the 6 classes"):
        model.save_pretrained(tmp_path)


# --- damaged folders ----------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path) -> Path:
    fresh().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text("utf8")) | changes
    kept = {key: value for key, value in config.items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(kept), "utf8")


def other_weights(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if "queries" not in name}, folder / "model.safetensors")


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
    "half a config": (lambda f: cut(f / "config.json", 0.5), ValueError, "config.json is damaged or cut off"),
    "empty config": (lambda f: cut(f / "config.json", 0), ValueError, "config.json is damaged or cut off"),
    "a list": (lambda f: (f / "config.json").write_text("[1, 2]"), ValueError, "config.json is damaged or cut off"),
    "bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), ValueError, "config.json is damaged"),
    "half the weights": (lambda f: cut(f / "model.safetensors", 0.5), ValueError, "safetensors is damaged or cut off"),
    "no weights at all": (lambda f: cut(f / "model.safetensors", 0), ValueError, "safetensors is damaged or cut off"),
    "another kind": (lambda f: edit(f, model_type="detr"), ValueError, "config.json is of a 'detr' model"),
    "a word less": (lambda f: edit(f, nheads="gone"), ValueError,
                    "does not describe a model (ConfigError: nheads is missing"),
    "a wrong kind": (lambda f: edit(f, backbone={"kind": "VGG"}), ValueError, "does not describe a model"),
    "no backbone": (lambda f: edit(f, backbone=None), ValueError, "does not describe a model"),
    "wrong heads": (lambda f: edit(f, nheads=5), ValueError, "multiple of 4 and of nheads=5"),
    "wrong names": (lambda f: edit(f, names=["a"]), ValueError, "one entry for each of the 6 classes"),
    "wrong sizes": (lambda f: edit(f, preprocess={"short_side": -1}), ValueError, "does not describe a model"),
    "other classes": (lambda f: edit(f, num_classes=7, names=None, category_ids=None), ValueError, "does not belong"),
    "other layers": (lambda f: edit(f, dec_layers=2), ValueError, "does not belong to the config.json beside it"),
    "fewer weights": (other_weights, ValueError, "does not belong to the config.json beside it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_file_and_a_remedy(damage, folder):
    spoil, kind, words = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(kind) as caught:
        DETR.from_pretrained(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", sorted(set(DAMAGES) - {"no config", "no weights", "another kind"}))
def test_the_other_door_names_the_same_faults(damage, folder):
    spoil, kind, words = DAMAGES[damage]
    spoil(folder)
    model = detr_tiny()
    before = deepcopy(model.state_dict())
    with pytest.raises(kind) as caught:
        load_pretrained(model, folder)
    assert words in str(caught.value)
    exactly(model.state_dict(), before)


# --- the hub ------------------------------------------------------------------------------------------------------
def test_a_model_is_pushed_with_all_that_belongs_to_it(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    seen = {}

    def upload_folder(self, *, repo_id, folder_path, **rest):
        seen.update(repo_id=repo_id, rest=rest)
        for path in Path(folder_path).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return "the address of the commit"

    class Repository:
        repo_id = "somebody/shapes"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: Repository)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = fresh()
    assert model.push_to_hub("somebody/shapes", commit_message="first") == "the address of the commit"
    assert seen["repo_id"] == "somebody/shapes" and seen["rest"]["commit_message"] == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = DETR.from_pretrained(tmp_path)
    exactly(output(again), output(model))
    assert model_config(again) == model_config(model)
    learned_positions(model)
    with pytest.raises(ValueError, match="memory.positions"):
        model.push_to_hub("somebody/shapes")


def test_a_model_comes_from_the_hub_by_its_id(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "cache" / "models--somebody--shapes"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123")
    (place / "snapshots").mkdir()
    (place / "snapshots" / "0123").symlink_to(folder)
    for again in (DETR.from_pretrained("somebody/shapes"), pretrained_model("somebody/shapes")):
        exactly(output(again), output(fresh()))
    with pytest.raises(RuntimeError, match="'somebody/else' is no file or folder here"):
        DETR.from_pretrained("somebody/else")


def test_options_reach_the_hub(folder, monkeypatch):
    seen = {}
    monkeypatch.setattr("detr_nb.hub.snapshot_download", lambda name, **options: seen.update(options) or str(folder))
    DETR.from_pretrained("somebody/shapes", revision="v2", token="secret")
    assert seen["revision"] == "v2" and seen["token"] == "secret"
    assert "model*.safetensors*" in seen["allow_patterns"]


# --- load_pretrained and runs -------------------------------------------------------------------------------------
def test_a_saved_folder_fills_a_model_that_fits(folder):
    model = load_pretrained(detr_tiny(), folder)
    exactly(model.state_dict(), fresh().state_dict())
    assert model_config(model) == model_config(fresh())
    exactly(load_pretrained(detr_tiny(), folder / "model.safetensors").state_dict(), model.state_dict())


@pytest.mark.parametrize("sizes, words", [
    ({"temperature": 10000}, "temperature is 20 in the file and 10000 in the model"),
    ({"strides": (4, 8, 16)}, "strides is (4, 8, 8) in the file and (4, 8, 16) in the model"),
    ({"nheads": 8}, "nheads is 4 in the file and 8 in the model"),
    ({"num_queries": 20}, "num_queries is 16 in the file and 20 in the model"),
])
def test_what_the_weights_do_not_show_is_compared(folder, sizes, words):
    with pytest.raises(ValueError) as caught:
        load_pretrained(detr_tiny(**sizes), folder)
    assert words in str(caught.value)


def saved_run(model: DETR, folder: Path) -> Path:
    save_run(Run(TrainConfig(ShapesData()), model, torch.optim.AdamW(model.parameters()), folder))
    return folder


def test_a_run_keeps_what_belongs_to_its_model(tmp_path):
    saved_run(fresh(), tmp_path)
    model = load_pretrained(detr_tiny(), tmp_path)
    assert model_config(model) == model_config(fresh())
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["preprocess"]["size"] == (64, 80)
    with pytest.raises(ValueError, match="temperature is 20 in the file and 5 in the model"):
        load_pretrained(detr_tiny(temperature=5), tmp_path)


def older(folder: Path) -> Path:
    """A run's checkpoint as it was written before it held more than names."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    kept = {key: value for key, value in state.items() if key not in ("preprocess", "threshold", "description")}
    torch.save(kept, folder / "checkpoint.pt")
    return folder


def test_older_checkpoints_leave_the_model_its_own_sizes(tmp_path):
    model = load_pretrained(detr_tiny(), older(saved_run(fresh(), tmp_path)))
    assert model.names == fresh().names
    assert (model.preprocess, model.threshold) == (detr_tiny().preprocess, detr_tiny().threshold)
    exactly(output(pretrained_model(tmp_path)), output(fresh()))


def test_a_model_without_words_can_be_trained_and_saved(tmp_path):
    model = fresh()
    model.memory.positions = LearnedPositions(128)
    saved_run(model, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["description"] is None
    other = detr_tiny()
    other.memory.positions = LearnedPositions(128)
    assert load_pretrained(other, tmp_path).preprocess == model.preprocess


def test_a_run_prepares_pictures_as_its_dataset_was():
    train = in_memory(VocDataset(BCCD, "trainval"), (64, 96))
    model = create_run(TrainConfig(model=TinyModel()), train).model
    assert model.preprocess == Preprocess(size=(64, 96)) and model.names == train.names


# --- Hugging Face's preparation -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def peer_folder(tmp_path_factory) -> Path:
    """A small random DETR that transformers saved."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    folder = tmp_path_factory.mktemp("peer")
    body = ResNetConfig(out_features=["stage4"], layer_type="basic", depths=[2, 2, 2, 2],
                        hidden_sizes=[64, 128, 256, 512])
    torch.manual_seed(0)
    DetrForObjectDetection(DetrConfig(
        backbone_config=body, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=7, num_labels=5,
    )).save_pretrained(folder)
    return folder


PREPARATIONS = {
    '{"size": {"shortest_edge": 640, "longest_edge": 900}}': Preprocess(640, 900),
    '{"size": 600, "max_size": 1000, "image_mean": [0.5, 0.5, 0.5]}': Preprocess(600, 1000, (0.5, 0.5, 0.5)),
    '{"size": 600}': Preprocess(600, 1333), "{}": Preprocess(800, 1333),
    '{"size": {"shortest_edge": 300}}': Preprocess(300, 2**20),
    '{"size": {"height": 60, "width": 80}, "image_std": [0.2, 0.3, 0.4]}':
        Preprocess(std=(0.2, 0.3, 0.4), size=(60, 80)),
    '{"do_normalize": false}': Preprocess(mean=(0, 0, 0), std=(1, 1, 1)),
}


@pytest.mark.parametrize("text", PREPARATIONS)
def test_the_preparation_of_a_hugging_face_folder_is_read(text, peer_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(peer_folder / name)
    (tmp_path / "preprocessor_config.json").write_text(text)
    assert pretrained_model(tmp_path).preprocess == PREPARATIONS[text]


@pytest.mark.parametrize("text, words", [
    ('{"size": {"max_height": 60, "max_width": 80}}', "a rule that is not known"),
    ('{"do_resize": false}', "do_resize False"), ('{"size": ', "preprocessor_config.json is damaged"),
])
def test_a_preparation_that_is_not_known_is_named(text, words, peer_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(peer_folder / name)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        pretrained_model(tmp_path)


@pytest.mark.parametrize("size", [(120, 160), (200, 90), (64, 64)])
def test_pictures_are_prepared_as_transformers_does(size, peer_folder, tmp_path):
    from transformers import DetrImageProcessor

    processor = DetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})
    processor.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(peer_folder / name)
    model, image = pretrained_model(tmp_path), bytes_of(*size)
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    ours = model.preprocess(image)
    assert ours.shape == expected.shape
    close(ours, expected, atol=0.02, rtol=0)


# --- a model from any source --------------------------------------------------------------------------------------
def official_file(folder: Path) -> Path:
    torch.save({"model": official_weights("detr_r18_small")}, folder / "official.pth")
    return folder / "official.pth"


def test_an_official_file_makes_its_model(tmp_path):
    model, reference = pretrained_model(official_file(tmp_path)), Reference("detr_r18_small")
    exactly(output(model), output(reference.model()))
    assert not model.training and model.names[17] == "cat" and model.preprocess == Preprocess(800, 1333)
    assert model_config(model)["backbone"] == {"kind": "ResNetConfig", "name": "resnet18", "dilation": False,
                                               "pretrained": False}


@every_model
def test_a_run_makes_its_model(name, tmp_path):
    exactly(output(pretrained_model(saved_run(fresh(name), tmp_path))), output(fresh(name)))
    assert model_config(pretrained_model(tmp_path / "checkpoint.pt")) == model_config(fresh(name))


def test_a_saved_folder_makes_its_model(folder):
    exactly(output(pretrained_model(folder)), output(fresh()))
    assert model_config(pretrained_model(folder)) == model_config(fresh())


def test_the_package_carries_a_model():
    expected = output(detr_tiny(pretrained=True))
    for source in (None, Path(detr_nb.__file__).parent / "weights" / "detr_tiny.pt"):
        exactly(output(pretrained_model(source)), expected)
        assert pretrained_model(source).preprocess == Preprocess(size=(128, 128))


def test_a_hugging_face_folder_makes_its_model(peer_folder):
    model = pretrained_model(peer_folder)
    expected = load_pretrained(detr_resnet18(**RESNET).eval(), peer_folder)
    exactly(output(model), output(expected))
    assert model.names == [f"LABEL_{i}" for i in range(5)]


def test_a_pre_norm_file_makes_a_pre_norm_model(tmp_path):
    torch.manual_seed(0)
    model = detr(ResNet("resnet34", pretrained=False), 3, pre_norm=True, **{**SIZES, "nheads": 8}).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    exactly(output(pretrained_model(tmp_path / "a.pth")), output(model))


def lay_into_cache(weights: dict, name: str, folder: Path) -> str:
    """Put weights where the published ones of a name would lie, under their own hash; the address of that file."""
    torch.save(weights, folder / "new.pth")
    digits = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
    address = re.sub(r"-[0-9a-f]{8}\.pth$", f"-{digits}.pth", PUBLISHED[name])
    (folder / "new.pth").rename(folder / address.rpartition("/")[2])
    return address


@pytest.mark.slow
def test_published_names_make_their_models(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    sizes = {**RESNET, "nheads": 8}
    for name, build in (("detr-r101", detr_resnet101), ("detr-r50-dc5", detr_resnet50_dc5)):
        torch.manual_seed(0)
        source = stirred(build(**sizes))
        address = lay_into_cache({"model": source.state_dict()}, name, tmp_path / "checkpoints")
        monkeypatch.setitem(PUBLISHED, name, address)
        found = pretrained_model(name)
        assert found.memory.backbone.strides == source.memory.backbone.strides
        exactly(output(found), output(source))


@pytest.mark.slow
def test_the_demonstration_model_is_made_too(tmp_path):
    torch.manual_seed(0)
    source = DETRDemo(91, 32, 8, 1, 2).eval()
    torch.save(source.state_dict(), tmp_path / "detr_demo-da2a99e9.pth")
    found = pretrained_model(tmp_path / "detr_demo-da2a99e9.pth")
    exactly(output(found), output(source))
    assert found.names[18] == "dog" and len(predict_image(found, bytes_of(60, 80), 0)["names"]) == 100


def without(part: str) -> dict[str, Tensor]:
    return {name: value for name, value in official_weights("detr_r18_small").items() if part not in name}


def resnext() -> dict[str, Tensor]:
    state = detr(ResNet("resnext50_32x4d", pretrained=False), 5, **{**SIZES, "nheads": 8}).state_dict()
    return {name: value for name, value in state.items() if "num_batches" not in name}


@pytest.mark.parametrize("state, words", [
    (partial(without, "class_embed"), "nothing in the checkpoint tells num_classes"),
    (partial(without, "query_embed"), "nothing in the checkpoint tells num_queries"),
    (partial(without, "layer4"), "the backbone of the checkpoint (2+2+2+0 blocks of 2 convolutions) is none of"),
    (partial(without, "layer4.1.bn1.bias"), "missing from the file: 'memory.backbone.body.layer4.1.bn1.bias'"),
    (lambda: without("nothing") | {"mask_head.lay1.weight": torch.zeros(1)}, "a model with masks"),
    (resnext, "of another shape"),
], ids=["classes", "queries", "stage", "bias", "masks", "resnext"])
def test_a_file_that_makes_no_model_is_named(state, words, tmp_path):
    torch.save({"model": state()}, tmp_path / "a.pth")
    with pytest.raises(ValueError) as caught:
        pretrained_model(tmp_path / "a.pth")
    assert words in str(caught.value)


def test_a_name_that_is_nothing_is_an_error():
    with pytest.raises(FileNotFoundError, match="no file or folder detr-r51"):
        pretrained_model("detr-r51")


# --- one picture --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shapes() -> DETR:
    return detr_tiny(pretrained=True)


def same(found: dict, other: dict) -> None:
    assert found.pop("names") == other.pop("names")
    exactly(found, other)


def test_a_picture_is_looked_at_as_by_hand(shapes):
    picture = Scenes(DEFAULT, 40, seed=4)[30][0]
    with torch.no_grad():
        (expected,) = postprocess(shapes(normalise(picture)[None]), [(128, 128)])
    found = predict_image(shapes, picture)
    chosen = expected["scores"] >= 0.5
    exactly(found["scores"], expected["scores"][chosen].sort(descending=True).values)
    order = expected["scores"][chosen].argsort(descending=True, stable=True)
    exactly(found["boxes"], expected["boxes"][chosen][order])
    assert found["names"] == [shapes.names[i] for i in expected["labels"][chosen][order]] and found["names"]


def test_boxes_are_in_pixels_of_the_picture_whatever_its_size(shapes):
    picture = Scenes(DEFAULT, 40, seed=4)[30][0]
    small, large = (predict_image(shapes, tv.resize(picture, [side, side])) for side in (128, 512))
    assert small["names"] == large["names"]
    close(4 * small["boxes"], large["boxes"], atol=30, rtol=0)


def test_a_file_is_read_upright(shapes, tmp_path):
    picture = tv.to_pil_image(Scenes(DEFAULT, 40, seed=4)[31][0]).resize((200, 128))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    upright = tv.pil_to_tensor(picture.transpose(Image.Transpose.ROTATE_270))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
        same(predict_image(shapes, source), predict_image(shapes, upright))


def test_a_threshold_may_be_given_and_travels(shapes):
    picture, model = Scenes(DEFAULT, 40, seed=4)[30][0], deepcopy(shapes)
    assert len(predict_image(model, picture, 0)["names"]) == 16
    model.threshold = 0.9
    assert (predict_image(model, picture)["scores"] >= 0.9).all()
    assert predict_image(model, picture, 1.0)["boxes"].shape == (0, 4)


def test_the_models_own_preparation_is_used(shapes):
    picture, model = Scenes(DEFAULT, 40, seed=4)[30][0], deepcopy(shapes)
    model.preprocess = replace(model.preprocess, mean=(0.9, 0.1, 0.5), size=(96, 160))
    with torch.no_grad():
        (expected,) = postprocess(shapes(model.preprocess(picture)[None]), [(128, 128)])
    close(predict_image(model, picture, 0)["scores"].sort().values, expected["scores"].sort().values)


def test_the_mode_stays_and_dropout_is_off():
    model = detr_tiny(dropout=0.5).train()
    model.encoder.eval()
    picture = bytes_of(60, 80)
    same(predict_image(model, picture, 0), predict_image(model, picture, 0))
    assert model.training and not model.encoder.training and model.decoder.training


def test_labels_without_names_are_numbers():
    assert set(predict_image(detr_tiny(num_classes=2), bytes_of(60, 80), 0)["names"]) <= {"0", "1"}


def test_a_model_in_double_precision_looks_too(shapes):
    picture = Scenes(DEFAULT, 40, seed=4)[30][0]
    assert predict_image(deepcopy(shapes).double(), picture)["names"] == predict_image(shapes, picture)["names"]


@pytest.mark.slow
def test_the_four_lines_of_the_readme_run(tmp_path):
    readme = (DATA.parents[1] / "README.md").read_text("utf8")
    (code,) = [block for block in readme.split("```python\n")[1:] if "detr-r50" in block]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    weights = {"model": official_weights("detr_r18_small")}
    address = lay_into_cache(weights, "detr-r50", tmp_path / "hub" / "checkpoints")
    smaller = f"from detr_nb.pretrained import PUBLISHED\nPUBLISHED['detr-r50'] = {address!r}\n"
    photograph = next((BCCD / "JPEGImages").glob("*.jpg"))
    (tmp_path / "photo.jpg").write_bytes(photograph.read_bytes())
    words = [sys.executable, "-c", smaller + code.split("```")[0]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={"TORCH_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert len([line for line in code.split("```")[0].splitlines() if line]) == 4 and "tensor" in done.stdout
