"""Weights in: from the authors' files, from Hugging Face's, from our own; and every way in which that can fail."""

import argparse
import hashlib
import json
import pathlib
import pickle
import subprocess
import sys
from copy import deepcopy
from functools import cache

import jaxtyping
import pytest
import torch
from official import DATA, Reference, batch, official_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d

import detr_nb
from detr_nb.backbone import ResNet
from detr_nb.checkpoints import read_checkpoint
from detr_nb.export import LastLayer, export_onnx, export_program
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.loading import ShapesData
from detr_nb.losses import SetCriterion
from detr_nb.matcher import HungarianMatcher
from detr_nb.model import (
    DETR,
    DETRDemo,
    detr,
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_tiny,
    postprocess,
)
from detr_nb.notation import Output, Target
from detr_nb.optimizer import freeze, rate_groups
from detr_nb.positions import LearnedPositions
from detr_nb.pretrained import COCO_NAMES, PUBLISHED, load_pretrained
from detr_nb.runs import Run, save_run
from detr_nb.training import TrainConfig

pytestmark = pytest.mark.slow  # a model is built and a file written in nearly every test; test_cli has a quick one

REFERENCES = ["detr_r18_small", pytest.param("detr_r50", marks=pytest.mark.slow)]
BATCHES = {"": ("image0_", (192, 256), (160, 224)), "odd/": ("image5_", (203, 251), (150, 217))}
close = torch.testing.assert_close


@cache
def loaded(name: str) -> tuple[Reference, dict[str, Output]]:
    """A reference, and what our model with the weights of a saved file makes of its two batches."""
    reference = Reference(name)
    file = folder_of("references") / f"{name}.pth"
    torch.save({"model": official_weights(name)}, file)
    model = load_pretrained(reference.fresh_model(), file).eval()
    with torch.no_grad():
        return reference, {key: model(*batch(*what)) for key, what in BATCHES.items()}


FOLDER: list[pathlib.Path] = []


def folder_of(name: str) -> pathlib.Path:
    """A folder for the files of this module."""
    folder = FOLDER[0] / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def common_folder(tmp_path_factory):
    FOLDER[:] = [tmp_path_factory.mktemp("pretrained")]


@pytest.fixture
def small() -> Reference:
    return Reference("detr_r18_small")


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return official_weights("detr_r18_small")


def save(path: pathlib.Path, value: object) -> pathlib.Path:
    torch.save(value, path)
    return path


# --- the authors' files -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("key", BATCHES, ids=["even", "odd"])
def test_a_loaded_model_predicts_what_the_authors_predicts(name, key):
    reference, ours = loaded(name)
    for kind, tolerance in (("logits", 5e-4), ("boxes", 1e-4)):
        layers = torch.cat((reference[f"{key}aux_{kind}"], reference[f"{key}pred_{kind}"][None]))
        close(getattr(ours[key], kind), layers, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_loaded_model_has_the_authors_matches_losses_and_detections(name):
    reference, ours = loaded(name)
    out, targets = ours[""], reference.targets()
    for ours_i, theirs_i in zip(HungarianMatcher()(out, targets), reference.matches(), strict=True):
        for pair, theirs in zip(ours_i, theirs_i, strict=True):
            assert torch.equal(torch.stack(pair), theirs)
    losses, official = SetCriterion(91)(out, targets), reference.under("loss/")
    assert losses.keys() == official.keys()
    close(losses, {key: official[key] for key in losses}, atol=5e-4, rtol=1e-4)
    sizes = [tuple(reference[f"target{i}/orig_size"].tolist()) for i in range(2)]
    for i, found in enumerate(postprocess(out, sizes)):
        official = reference.under(f"post{i}/")
        assert torch.equal(found["labels"], official["labels"])
        close(found["scores"], official["scores"], atol=1e-4, rtol=0)
        close(found["boxes"], official["boxes"], atol=1e-4 * max(sizes[i]), rtol=0)


def training_state(weights: dict[str, Tensor], **options: object) -> dict:
    """What the authors' training script saves."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 200)
    args = argparse.Namespace(lr=1e-4, device="cuda", coco_path="/data", frozen_weights=None, **options)
    return {"model": weights, "optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "epoch": 299,
            "args": args}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch before 1.6"])
def test_a_file_of_the_training_script_is_read_with_its_options(small, weights, tmp_path, zipped):
    state = training_state(weights, nheads=8, dilation=False, pre_norm=False)
    torch.save(state, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    model = load_pretrained(small.fresh_model(), tmp_path / "checkpoint.pth")
    close(model.state_dict(), small.state, atol=0, rtol=0)
    told = {"nheads": 8, "backbone.dilation": False, "pre_norm": False}
    assert read_checkpoint(tmp_path / "checkpoint.pth").settings == told


def test_official_models_name_the_raw_ids_of_coco(small, weights, tmp_path):
    model = load_pretrained(small.fresh_model(), save(tmp_path / "a.pth", {"model": weights}))
    assert model.category_ids == list(range(91)) and model.names[1] == "person" and model.names[90] == "toothbrush"
    peers = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert COCO_NAMES[1:] == peers[1:] and (COCO_NAMES[0], peers[0]) == ("N/A", "__background__")


def test_files_with_other_classes_name_nothing(weights, small, tmp_path):
    other = weights | {"class_embed.weight": torch.zeros(8, 64), "class_embed.bias": torch.zeros(8)}
    model = small.fresh_model(7)
    model.names, model.category_ids = list("abcdefg"), list(range(7))
    load_pretrained(model, save(tmp_path / "a.pth", {"model": other}))
    assert model.names is None and model.category_ids is None


def test_half_precision_files_fill_a_model_in_single_precision(small, weights, tmp_path):
    half = {name: value.half() for name, value in weights.items()}
    model = load_pretrained(small.fresh_model(), save(tmp_path / "a.pth", {"model": half}))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    close(model.queries.embedding.weight, weights["query_embed.weight"].half().float())


def test_the_mode_of_the_model_stays(small, weights, tmp_path):
    file = save(tmp_path / "a.pth", {"model": weights})
    assert load_pretrained(small.fresh_model().eval(), file).training is False
    assert load_pretrained(small.fresh_model().train(), str(file)).training is True


def test_learned_positions_are_loaded(small, weights, tmp_path):
    vectors = {f"backbone.1.{axis}_embed.weight": torch.randn(50, 32) for axis in ("row", "col")}
    model = small.fresh_model()
    model.memory.positions = LearnedPositions(64)
    load_pretrained(model, save(tmp_path / "a.pth", {"model": weights | vectors}))
    assert torch.equal(model.memory.positions.row.weight, vectors["backbone.1.row_embed.weight"])
    assert torch.equal(model.memory.positions.col.weight, vectors["backbone.1.col_embed.weight"])


def test_the_demonstration_model_is_loaded_from_a_bare_state_dict(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 1}
    source, model = DETRDemo(91, **sizes), DETRDemo(91, **sizes)
    load_pretrained(model, save(tmp_path / "detr_demo-da2a99e9.pth", source.state_dict()))
    close(model.state_dict(), source.state_dict(), atol=0, rtol=0)
    assert model.names[18] == "dog"


# Official names by hand and the other way round: what a writer of the official format would do.
def official_name(name: str) -> str:
    kind = "encoder" if name.startswith("encoder") else "decoder"
    numbers = {"attention_step": 1, "cross_step": 2, "feed_step": 2 if kind == "encoder" else 3}
    for ours, theirs in {
        "memory.backbone.body": "backbone.0.body", "memory.project": "input_proj", "queries.embedding": "query_embed",
        "decoder.head.classes": "class_embed", "decoder.head.boxes.0": "bbox_embed.layers.0",
        "decoder.head.boxes.2": "bbox_embed.layers.1", "decoder.head.boxes.4": "bbox_embed.layers.2",
        "encoder.layers": "transformer.encoder.layers", "decoder.layers": "transformer.decoder.layers",
        "decoder.norm": "transformer.decoder.norm", "encoder.norm": "transformer.encoder.norm",
        "cross.attention.": "multihead_attn.", ".attention.": ".self_attn.", "_attn.out": "_attn.out_proj",
        "feed_forward.0": "linear1", "feed_forward.3": "linear2",
        **{f"{step}.norm": f"norm{number}" for step, number in numbers.items()},
    }.items():
        name = name.replace(ours, theirs)
    return name


def official_state(model: DETR) -> dict[str, Tensor]:
    state = model.state_dict()
    written = {official_name(name): value for name, value in state.items() if ".q." not in name
               and ".k." not in name and ".v." not in name}
    for name in [name for name in state if ".q." in name]:
        stem, kind = official_name(name).split(".q.")
        written[f"{stem}.in_proj_{kind}"] = torch.cat([state[name.replace(".q.", f".{part}.")] for part in "qkv"])
    return written


SMALL = {"num_classes": 5, "num_queries": 7, "pretrained_backbone": False, "hidden_dim": 32, "nheads": 4,
         "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 48}


@pytest.mark.slow
@pytest.mark.parametrize("build", [detr_resnet50, detr_resnet50_dc5, detr_resnet101, detr_resnet101_dc5],
                         ids=lambda build: build.__name__)
def test_every_published_architecture_goes_there_and_back(build, tmp_path):
    torch.manual_seed(0)
    source, model = build(**SMALL), build(**SMALL)
    written = official_state(source)
    assert not written.keys() & source.state_dict().keys()
    load_pretrained(model, save(tmp_path / "a.pth", {"model": written}))
    close(model.state_dict(), source.state_dict(), atol=0, rtol=0)


def test_the_names_of_the_official_checkpoint_are_those_written_by_hand(small, weights):
    assert official_state(small.model()).keys() == weights.keys()


@pytest.mark.slow
def test_the_official_r50_has_the_names_and_sizes_that_our_build_function_makes():
    rows = json.loads((DATA / "detr_r50.json").read_text())["state"]
    written = official_state(detr_resnet50(pretrained_backbone=False))
    assert {name: list(value.shape) for name, value in written.items()} == {name: shape for name, shape, *_ in rows}


def test_pre_norm_files_bring_the_encoders_norm(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 1, "dim_feedforward": 48}
    source, model = (detr(ResNet("resnet18", pretrained=False), 5, 7, pre_norm=True, **sizes) for _ in range(2))
    source.encoder.norm.weight.data.normal_()
    written = official_state(source)
    assert "transformer.encoder.norm.weight" in written
    load_pretrained(model, save(tmp_path / "a.pth", training_state(written, nheads=4, dilation=False, pre_norm=True)))
    close(model.state_dict(), source.state_dict(), atol=0, rtol=0)
    post = detr(ResNet("resnet18", pretrained=False), 5, 7, **sizes)
    with pytest.raises(ValueError, match="unknown to the model: 'encoder.norm.bias', 'encoder.norm.weight'"):
        load_pretrained(post, tmp_path / "a.pth")


# --- Hugging Face -------------------------------------------------------------------------------------------------
BACKBONES = {  # what transformers is asked for, and what our model must be built on
    "resnet config, basic blocks": (
        {"resnet": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}},
        ("resnet18", False),
    ),
    "resnet config, bottlenecks": (
        {"resnet": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3]}}, ("resnet50", False)
    ),
    "timm": ({"backbone": "resnet18"}, ("resnet18", False)),
    "timm, dilated": ({"backbone": "resnet50", "dilation": True}, ("resnet50", True)),
    "timm, 101 layers": ({"backbone": "resnet101"}, ("resnet101", False)),
    "timm, 101 layers, dilated": ({"backbone": "resnet101", "dilation": True}, ("resnet101", True)),
}
QUICK = ("resnet config, basic blocks", "timm")
every_backbone = pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in BACKBONES])
SIZES = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 7, "num_labels": 5}


def shake(model: nn.Module) -> None:
    """Numbers as after training: norms that are not the identity, and attention that tells queries and places apart."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.ndim == 1 and name.endswith("weight"):
            value.copy_(0.3 + 0.1 * noise.abs() if "backbone" in name else 1 + 0.1 * noise)
        elif value.ndim == 1:
            value.copy_(0.1 * noise)
        elif "query_position" in name:
            value.copy_(noise)
        elif value.ndim == 2:
            value.copy_(noise * (4 if ".q_proj" in name else 1) / value.shape[1] ** 0.5)


@cache
def peer(kind: str) -> tuple[nn.Module, pathlib.Path]:
    """A random DETR of transformers and the folder in which it saved itself."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    asked, _ = BACKBONES[kind]
    if "resnet" in asked:
        asked = {"backbone_config": ResNetConfig(out_features=["stage4"], **asked["resnet"])}
    torch.manual_seed(0)
    model = DetrForObjectDetection(DetrConfig(**asked, **SIZES)).eval()
    shake(model)
    folder = folder_of("peers") / kind.replace(", ", "_").replace(" ", "_")
    model.save_pretrained(folder)
    return model, folder


def ours_like(kind: str) -> DETR:
    """Our model with the architecture of the peer and other random weights."""
    torch.manual_seed(7)
    name, dilation = BACKBONES[kind][1]
    return detr(ResNet(name, dilation, pretrained=False), 5, 7, 32, 4, 1, 2, 48).eval()


def same_weights(kind: str, source: str | pathlib.Path, folder: pathlib.Path) -> None:
    """Both sources fill a model with the same numbers."""
    models = [load_pretrained(ours_like(kind), place) for place in (source, folder)]
    close(models[0].state_dict(), models[1].state_dict(), atol=0, rtol=0)


def odd_batch() -> tuple[Tensor, Tensor]:
    return batch("image5_", (103, 131), (75, 118))


def peer_output(model: nn.Module, targets: list[Target]) -> object:
    images, pad = odd_batch()
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    with torch.no_grad():
        return model(pixel_values=images, pixel_mask=(~pad).long(), labels=labels)


def some_targets() -> list[Target]:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4]])
    return [Target(labels=torch.tensor([1, 3]), boxes=boxes), Target(labels=torch.tensor([0]), boxes=boxes[1:])]


def compare(model: DETR, theirs: nn.Module) -> None:
    """Outputs and losses of every decoder layer are those of the peer.

    The peer is cut after each layer in turn. Its own option for that, `auxiliary_loss`, is of no use: as of
    transformers 5.23 it hands the normed output of a layer to the next one, which neither the authors' program does
    nor it itself without that option.
    """
    targets, criterion = some_targets(), SetCriterion(model.decoder.head.classes.out_features - 1)
    images, pad = odd_batch()
    with torch.no_grad():
        out, blind = model(images, pad), model(images, torch.zeros_like(pad))
    # Queries, layers and the mask make a difference ten times as large as what passes below.
    spreads = (out.logits.std(2), out.logits.diff(dim=0), blind.logits - out.logits)
    assert min(spread.abs().max() for spread in spreads) > 10 * 5e-4
    layers = theirs.model.decoder.layers
    try:
        for i in range(len(layers)):
            theirs.model.decoder.layers = layers[: i + 1]
            expected = peer_output(theirs, targets)
            close(out.logits[i], expected.logits, atol=5e-4, rtol=0)
            close(out.boxes[i], expected.pred_boxes, atol=1e-4, rtol=0)
            losses = criterion(Output(out.logits[i, None], out.boxes[i, None]), targets)
            assert set(criterion.weights) & set(losses) <= set(expected.loss_dict)
            for name, value in expected.loss_dict.items():
                close(losses[name], value.to(losses[name].dtype), atol=5e-4, rtol=1e-4)
            close(criterion.total(losses), expected.loss, atol=5e-3, rtol=1e-4)
    finally:
        theirs.model.decoder.layers = layers


@every_backbone
def test_a_hugging_face_folder_gives_the_same_outputs_and_losses(kind):
    theirs, folder = peer(kind)
    model = ours_like(kind)
    assert load_pretrained(model, folder) is model
    compare(model, theirs)
    assert model.names == [f"LABEL_{i}" for i in range(5)] and model.category_ids == list(range(5))


@pytest.mark.parametrize("kind", QUICK)
def test_names_as_they_are_in_memory_are_read_too(kind, tmp_path):
    theirs, folder = peer(kind)
    state = theirs.state_dict()
    assert state.keys() != load_file(folder / "model.safetensors").keys()
    save_file(state, tmp_path / "model.safetensors")
    same_weights(kind, tmp_path, folder)


@pytest.mark.parametrize("kind", QUICK)
def test_one_file_is_as_good_as_its_folder(kind, tmp_path):
    theirs, folder = peer(kind)
    same_weights(kind, folder / "model.safetensors", folder)
    same_weights(kind, save(tmp_path / "pytorch_model.bin", load_file(folder / "model.safetensors")), folder)


def test_a_folder_in_several_pieces_is_read(tmp_path):
    theirs, folder = peer("timm")
    theirs.save_pretrained(tmp_path, max_shard_size="20MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same_weights("timm", tmp_path, folder)


def test_batch_counters_of_older_files_are_passed_over(tmp_path):
    _, folder = peer("timm")
    state = load_file(folder / "model.safetensors")
    counted = state | {"model.backbone.conv_encoder.model.bn1.num_batches_tracked": torch.tensor(3)}
    save_file(counted, tmp_path / "model.safetensors")
    same_weights("timm", tmp_path, folder)


def edited_config(folder: pathlib.Path, goal: pathlib.Path, **changes: object) -> pathlib.Path:
    """A copy of a folder whose configuration says something else."""
    save_file(load_file(folder / "model.safetensors"), goal / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (goal / "config.json").write_text(json.dumps(config | changes))
    return goal


@pytest.mark.parametrize("changes, words", [
    ({"encoder_attention_heads": 8}, "nheads is 8 in the file and 4 in the model"),
    ({"dilation": True}, "dilation is True in the file and False in the model"),
    ({"activation_function": "gelu"}, "activation_function is gelu in the file and relu in the model"),
    ({"model_type": "rt_detr"}, "'rt_detr' model"),
    ({"model_type": "table-transformer"}, "pre_norm is True in the file and False in the model"),
    ({"backbone_config": {"model_type": "resnet", "downsample_in_bottleneck": True}},
     "downsample_in_bottleneck is True in the file and False in the model"),
])
def test_what_only_the_configuration_tells_is_compared(tmp_path, changes, words):
    folder = edited_config(peer("timm")[1], tmp_path, **changes)
    refused(ours_like("timm"), folder, words)


def test_a_damaged_configuration_is_named(tmp_path):
    folder = edited_config(peer("timm")[1], tmp_path)
    (folder / "config.json").write_text((folder / "config.json").read_text()[:100])
    refused(ours_like("timm"), folder, "config.json is damaged")


def test_class_names_come_in_the_order_of_their_numbers(tmp_path):
    names = {str(i): f"class {i}" for i in (4, 0, 3, 1, 2)}
    model = load_pretrained(ours_like("timm"), edited_config(peer("timm")[1], tmp_path, id2label=names))
    assert model.names == [f"class {i}" for i in range(5)]


def test_a_table_transformer_is_a_pre_norm_detr(tmp_path):
    from transformers import TableTransformerConfig, TableTransformerForObjectDetection

    torch.manual_seed(0)
    config = TableTransformerConfig(
        backbone="resnet18", use_timm_backbone=True, use_pretrained_backbone=False, **SIZES)
    theirs = TableTransformerForObjectDetection(config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    sizes = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 48}
    model = detr(ResNet("resnet18", pretrained=False), 5, 7, pre_norm=True, **sizes).eval()
    compare(load_pretrained(model, tmp_path), theirs)


@pytest.mark.parametrize("old", [False, True], ids=["names of today", "older names"])
def test_learned_positions_of_hugging_face(tmp_path, old):
    from transformers import DetrConfig, DetrForObjectDetection

    torch.manual_seed(0)
    theirs = DetrForObjectDetection(DetrConfig(backbone="resnet18", position_embedding_type="learned", **SIZES)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    if old:
        state = load_file(tmp_path / "model.safetensors")
        state = {name.replace("model.position", "model.backbone.position"): value for name, value in state.items()}
        assert "model.backbone.position_embedding.row_embeddings.weight" in state
        save_file(state, tmp_path / "model.safetensors")
    model = ours_like("timm")
    model.memory.positions = LearnedPositions(32)
    compare(load_pretrained(model, tmp_path), theirs)
    row, col = model.memory.positions.row, model.memory.positions.col
    model.memory.positions.row, model.memory.positions.col = col, row  # the trap: channels are [x | y] here
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        compare(model, theirs)


def hub_cache(folder: pathlib.Path, monkeypatch, source: pathlib.Path | None = None) -> None:
    """Let the hub's client look into a cache of this test, without a network; it may hold one model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if source:
        (folder / "models--somebody--detr" / "refs").mkdir(parents=True)
        (folder / "models--somebody--detr" / "refs" / "main").write_text("0123")
        (folder / "models--somebody--detr" / "snapshots").mkdir()
        (folder / "models--somebody--detr" / "snapshots" / "0123").symlink_to(source)


def test_an_id_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    _, folder = peer("timm")
    hub_cache(tmp_path, monkeypatch, folder)
    same_weights("timm", "somebody/detr", folder)


def test_an_existing_path_wins_over_an_id_of_the_hub(tmp_path, monkeypatch, weights, small):
    monkeypatch.chdir(tmp_path)
    hub_cache(tmp_path / "cache", monkeypatch)
    (tmp_path / "somebody").mkdir()
    save(tmp_path / "somebody" / "detr", {"model": weights})
    close(load_pretrained(small.fresh_model(), "somebody/detr").state_dict(), small.state, atol=0, rtol=0)


def test_a_model_that_the_hub_does_not_give_is_named(tmp_path, monkeypatch, small):
    hub_cache(tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match="'nobody/nothing' is no file or folder here"):
        load_pretrained(small.fresh_model(), "nobody/nothing")


# --- our own files ------------------------------------------------------------------------------------------------
def test_a_run_of_ours_is_loaded_from_its_folder_or_its_file(tmp_path):
    torch.manual_seed(0)
    source = detr_tiny(num_classes=3)
    source.names, source.category_ids = list("abc"), [3, 5, 8]
    source.memory.backbone.stages[0].norm1.running_mean.normal_()
    save_run(Run(TrainConfig(ShapesData()), source, torch.optim.AdamW(source.parameters()), tmp_path))
    for place in (tmp_path, tmp_path / "checkpoint.pt"):
        model = load_pretrained(detr_tiny(num_classes=3), place)
        close(model.state_dict(), source.state_dict(), atol=0, rtol=0)
        assert (model.names, model.category_ids) == (["a", "b", "c"], [3, 5, 8])


def test_the_weights_of_the_package_are_a_checkpoint_like_any_other():
    file = pathlib.Path(detr_nb.__file__).parent / "weights" / "detr_tiny.pt"
    model, expected = load_pretrained(detr_tiny(), file), detr_tiny(pretrained=True)
    close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)
    assert model.names == list(expected.names)


# --- what can go wrong --------------------------------------------------------------------------------------------
def refused(model: nn.Module, source: str | pathlib.Path, words: str, kind: type[Exception] = ValueError) -> None:
    """Loading fails with these words and leaves the model as it was, names and mode included."""
    model.names, model.category_ids = ["kept"], [1]
    before, mode = deepcopy(model.state_dict()), model.training
    with pytest.raises(kind) as caught:
        load_pretrained(model, source)
    assert words in str(caught.value), str(caught.value)
    close(model.state_dict(), before, atol=0, rtol=0)
    assert (model.names, model.category_ids, model.training) == (["kept"], [1], mode)


DAMAGES = {  # changes of the authors' state dict, and what the error says
    "missing": (lambda s: s.pop("transformer.decoder.layers.1.norm2.bias"),
                "missing from the file: 'decoder.layers.1.cross_step.norm.bias'"),
    "no queries": (lambda s: s.pop("query_embed.weight"), "missing from the file: 'queries.embedding.weight'"),
    "extra": (lambda s: s.update({"something.weight": torch.zeros(1)}),
              "unknown to the model: 'something.weight'"),
    "shape": (lambda s: s.update({"transformer.decoder.norm.bias": torch.zeros(3)}),
              "of another shape: 'decoder.norm.bias (3,) for (64,)'"),
    "classes": (lambda s: s.update({"class_embed.weight": torch.zeros(5, 64), "class_embed.bias": torch.zeros(5)}),
                "num_classes is 4 in the file and 91 in the model"),
    "stack": (lambda s: s.update({"transformer.encoder.layers.0.self_attn.in_proj_bias": torch.zeros(100)}),
              "of another shape: 'encoder.layers.0.attention.k.bias (34,) for (64,)'"),
    "mask head": (lambda s: s.update({"mask_head.lay1.weight": torch.zeros(1)}), "a model with masks"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_dict_that_does_not_fit_is_refused(small, weights, tmp_path, damage):
    change, words = DAMAGES[damage]
    change(weights)
    refused(small.fresh_model(), save(tmp_path / "a.pth", {"model": weights}), words)


@pytest.mark.parametrize("sizes, words", [
    ({"num_queries": 30}, "num_queries is 20 in the file and 30 in the model"),
    ({"num_classes": 90}, "num_classes is 91 in the file and 90 in the model"),
    ({"hidden_dim": 32}, "hidden_dim is 64 in the file and 32 in the model"),
    ({"enc_layers": 3}, "enc_layers is 2 in the file and 3 in the model"),
    ({"dec_layers": 2}, "dec_layers is 3 in the file and 2 in the model"),
    ({"dim_feedforward": 256}, "dim_feedforward is 128 in the file and 256 in the model"),
    ({"backbone": ResNet("resnet34", pretrained=False)},
     "2+2+2+2 blocks of 2 convolutions in the file and 3+4+6+3 blocks"),
    ({"nheads": 4}, "nheads is 8 in the file and 4 in the model"),
    ({"pre_norm": True}, "missing from the file: 'encoder.norm.bias', 'encoder.norm.weight'"),
])
def test_another_architecture_is_named_by_its_argument(weights, tmp_path, sizes, words):
    arguments = {"num_classes": 91, "num_queries": 20, "hidden_dim": 64, "enc_layers": 2, "dec_layers": 3,
                 "dim_feedforward": 128} | sizes
    model = detr(arguments.pop("backbone", None) or ResNet("resnet18", pretrained=False), **arguments)
    file = save(tmp_path / "a.pth", training_state(weights, nheads=8, dilation=False, pre_norm=False))
    refused(model, file, words)


@pytest.mark.parametrize("model", [detr_tiny(), DETRDemo(91, 64, 8, 2, 3)], ids=["tiny", "demo"])
def test_another_kind_of_model_is_refused(model, weights, tmp_path):
    refused(model, save(tmp_path / "a.pth", {"model": weights}), "does not fit, and the model is left as it was")


@pytest.mark.slow
def test_dilation_shows_in_the_name_of_a_published_file(tmp_path):
    """Both architectures have the same names and shapes, so only the name of the file can tell them apart."""
    state = official_state(detr_resnet50(**SMALL))
    for name, fitting, other in (("detr-r50", detr_resnet50, detr_resnet50_dc5),
                                 ("detr-r50-dc5", detr_resnet50_dc5, detr_resnet50)):
        file = save(tmp_path / PUBLISHED[name].rpartition("/")[2], {"model": state})
        load_pretrained(fitting(**SMALL), file)
        refused(other(**SMALL), file, "dilation is")


@pytest.mark.slow
def test_published_files_are_found_by_name_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    source = detr_resnet101_dc5(**SMALL)
    save(tmp_path / "small.pth", {"model": official_state(source)})
    digits = hashlib.sha256((tmp_path / "small.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "small.pth").rename(tmp_path / "checkpoints" / f"detr-r101-dc5-{digits}.pth")
    address = PUBLISHED["detr-r101-dc5"].replace("a2e86def", digits)
    monkeypatch.setitem(PUBLISHED, "detr-r101-dc5", address)
    for name in ("detr-r101-dc5", address):
        close(load_pretrained(detr_resnet101_dc5(**SMALL), name).state_dict(), source.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch before 1.6"])
@pytest.mark.parametrize("share", [0, 1e-6, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(small, weights, tmp_path, zipped, share):
    torch.save({"model": weights}, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "part.pth").write_bytes(content[: int(share * len(content))])
    refused(small.fresh_model(), tmp_path / "part.pth", "damaged, cut off or no checkpoint")


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused(tmp_path, share):
    content = (peer("timm")[1] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: int(share * len(content))])
    refused(ours_like("timm"), tmp_path, "damaged or cut off")


@pytest.mark.parametrize("content", [b"<html>404 not found</html>", b"\x00" * 1000, b"PK\x03\x04" + b"x" * 500])
def test_a_file_that_is_something_else_is_refused(small, tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    refused(small.fresh_model(), tmp_path / "a.pth", "damaged, cut off or no checkpoint")


class Spy:
    def __init__(self, path: pathlib.Path):
        self.path = str(path)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def test_nothing_in_a_file_is_run(small, weights, tmp_path):
    file = save(tmp_path / "a.pth", {"model": weights, "spy": Spy(tmp_path / "was here")})
    refused(small.fresh_model(), file, "holds more than tensors")
    assert not (tmp_path / "was here").exists()
    pickle.loads(pickle.dumps(Spy(tmp_path / "was here")))
    assert (tmp_path / "was here").exists()  # an ordinary unpickler would have run it


@pytest.mark.parametrize("value, words", [
    (nn.Linear(2, 2), "more than tensors (torch.nn.modules.linear.Linear)"),
    ({"model": nn.Linear(2, 2)}, "more than tensors"),
    (torch.zeros(3), "no weights"), ({}, "no weights"), ({"model": {}}, "no weights"), ({"epoch": 3}, "no weights"),
    ({"model": {"a": 1.0}}, "no weights"), ({"fc.weight": torch.zeros(2)}, "the names of no DETR"),
], ids=["module", "module inside", "tensor", "empty", "empty model", "no model", "number", "classifier"])
def test_other_contents_are_refused(small, tmp_path, value, words):
    refused(small.fresh_model(), save(tmp_path / "a.pth", value), words)


def test_paths_inside_the_options_are_refused_by_name(small, weights, tmp_path):
    state = training_state(weights, folder=pathlib.PurePosixPath("x"))
    refused(small.fresh_model(), save(tmp_path / "a.pth", state), "(pathlib.PurePosixPath)")


def test_the_allow_list_is_closed_again(small, weights, tmp_path):
    load_pretrained(small.fresh_model(), save(tmp_path / "a.pth", training_state(weights, nheads=8)))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    "source", ["nowhere.pth", "./somebody/detr", "/nowhere/detr", "a/b/c", "some words", "x.safetensors"])
def test_a_missing_file_is_named(small, source):
    refused(small.fresh_model(), source, f"no file or folder {source}", FileNotFoundError)


def test_a_folder_without_weights_is_named(small, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    refused(small.fresh_model(), tmp_path, "neither model.safetensors nor our checkpoint.pt")


def test_a_download_is_checked_kept_and_used_again(small, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = save(tmp_path / "whole.pth", {"model": weights})
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    right, wrong = tmp_path / f"small-{digits}.pth", tmp_path / "small-01234567.pth"
    for path in (right, wrong):
        path.hardlink_to(file)
    monkeypatch.setitem(PUBLISHED, "small", right.as_uri())
    refused(small.fresh_model(), wrong.as_uri(), "invalid hash value")
    for source in (right.as_uri(), "small"):
        close(load_pretrained(small.fresh_model(), source).state_dict(), small.state, atol=0, rtol=0)
        right.unlink(missing_ok=True)  # the second time it comes from the cache
    assert [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir()] == [right.name]
    refused(small.fresh_model(), (tmp_path / "gone-01234567.pth").as_uri(), "the network does not give", RuntimeError)
    refused(small.fresh_model(), "http://127.0.0.1:9/gone-01234567.pth", "give its path", RuntimeError)
    refused(small.fresh_model(), "https://example.org/model.pth", "no hash in its name")


def test_the_published_list_is_complete_and_has_hashes():
    kinds = ("r50", "r50-dc5", "r101", "r101-dc5", "r50-panoptic", "r50-dc5-panoptic", "r101-panoptic", "demo")
    assert list(PUBLISHED) == [f"detr-{kind}" for kind in kinds]
    assert all(address.startswith("https://dl.fbaipublicfiles.com/detr/detr") for address in PUBLISHED.values())
    assert len({address.rpartition("-")[2] for address in PUBLISHED.values()}) == len(PUBLISHED)


def test_files_of_the_authors_are_read_without_the_models_of_hugging_face(weights, tmp_path):
    save(tmp_path / "a.pth", {"model": weights})
    code = ("import sys\nfrom detr_nb.pretrained import read_checkpoint\nfrom pathlib import Path\n"
            f"assert len(read_checkpoint(Path({str(tmp_path / 'a.pth')!r})).state) == {len(weights)}\n"
            "print(sorted({'transformers', 'timm'} & set(sys.modules)))")
    assert run_alone(code) == "[]"


# --- changing a model ---------------------------------------------------------------------------------------------
@pytest.fixture
def tiny() -> DETR:
    return detr_tiny(pretrained=True)


def test_a_new_head_keeps_the_rows_that_it_should(tiny):
    old = deepcopy(tiny.decoder.head.classes)
    model = replace_head(tiny, 4, keep={0: 5, 3: 1})
    assert model is tiny and model.names is None and model.category_ids is None
    new = model.decoder.head.classes
    assert new.weight.shape == (5, 128) and new.weight.requires_grad
    for row, source in {0: 5, 3: 1, 4: 6}.items():
        assert torch.equal(new.weight[row], old.weight[source]) and new.bias[row] == old.bias[source]
    for row in (1, 2):
        assert not any(torch.equal(new.weight[row], weight) for weight in old.weight)
    assert torch.equal(model.decoder.head.boxes[0].weight, detr_tiny(pretrained=True).decoder.head.boxes[0].weight)


def test_kept_rows_keep_their_scores(tiny):
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tiny(images)
        after = replace_head(deepcopy(tiny), 2, keep={0: 3, 1: 0})(images)
    close(after.boxes, before.boxes)
    close(after.logits, before.logits[..., [3, 0, 6]])


@pytest.mark.parametrize("num_classes, keep, words", [
    (0, None, "num_classes is 0: it must be a whole number of at least 1"),
    (3, {3: 0}, "new classes in keep must be different numbers from 0 to 2"),
    (3, {0: 6}, "old classes in keep must be from 0 to 5"), (3, {0: -1}, "old classes in keep"),
])
def test_an_impossible_head_is_refused_and_changes_nothing(tiny, num_classes, keep, words):
    before = tiny.decoder.head.classes
    with pytest.raises(ValueError, match=words):
        replace_head(tiny, num_classes, keep)
    assert tiny.decoder.head.classes is before and tiny.names


def test_fewer_and_more_queries(tiny):
    old = tiny.queries.embedding.weight.detach().clone()
    fewer = resize_queries(deepcopy(tiny), 10)
    chosen = resize_queries(deepcopy(tiny), 3, keep=[15, 0, 7])
    assert torch.equal(fewer.queries.embedding.weight, old[:10])
    assert torch.equal(chosen.queries.embedding.weight, old[[15, 0, 7]])
    torch.manual_seed(0)
    more = resize_queries(tiny, 1016).queries.embedding.weight
    assert torch.equal(more[:16], old) and more.requires_grad
    assert abs(more[16:].mean()) < 0.02 and abs(more[16:].std() - 1) < 0.02
    with torch.no_grad():
        assert chosen(torch.zeros(1, 3, 64, 64)).boxes.shape == (3, 1, 3, 4)


@pytest.mark.parametrize("n, keep, words", [
    (0, None, "resize_queries.n is 0: it must be"),
    (2, [0, 1, 2], "keep names 3 queries"), (5, [0, 16], "from 0 to 15"),
    (5, [1, 1], "different"), (5, [-1], r"keep\[0\] is -1: it must be a whole number of at least 0"),
])
def test_impossible_queries_are_refused_and_change_nothing(tiny, n, keep, words):
    before = tiny.queries
    with pytest.raises(ValueError, match=words):
        resize_queries(tiny, n, keep)
    assert tiny.queries is before


def test_a_changed_model_follows_the_type_of_the_old_one(tiny):
    model = resize_queries(replace_head(tiny.double(), 2), 30)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_changes_are_refused_by_a_loaded_architecture_only_until_they_are_made(weights, small, tmp_path):
    """The order that the error recommends: build as the file, load, then change."""
    model = load_pretrained(small.fresh_model(), save(tmp_path / "a.pth", {"model": weights}))
    model = resize_queries(replace_head(model, 2), 40).eval()
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 64, 64))
    assert out.logits.shape == (3, 1, 40, 3)


def test_freezing(tiny):
    assert freeze(tiny, "memory.backbone", "queries") is tiny
    frozen = {name for name, parameter in tiny.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in tiny.named_parameters() if name.startswith(("memory.backbone.", "queries."))}
    with pytest.raises(ValueError, match="no parameter lies in 'decoder.layer'"):
        freeze(tiny, "decoder.layer")


def test_rates_by_part(tiny):
    freeze(tiny, "encoder.layers.0")
    rates = {"": 1e-4, "memory.backbone": 0, "memory.backbone.stages.2": 1e-5, "decoder.head.classes": 1e-2}
    groups = {group["name"]: group for group in rate_groups(tiny, rates)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "": 1e-4, "memory.backbone.stages.2": 1e-5, "decoder.head.classes": 1e-2}
    place = {id(parameter): name for name, group in groups.items() for parameter in group["params"]}
    for name, parameter in tiny.named_parameters():
        if name.startswith("memory.backbone.stages.2."):
            assert place[id(parameter)] == "memory.backbone.stages.2"
        elif name.startswith(("memory.backbone.", "encoder.layers.0.")):
            assert id(parameter) not in place and not parameter.requires_grad
        else:
            assert place[id(parameter)] == ("decoder.head.classes" if "head.classes" in name else "")
    torch.optim.AdamW(list(groups.values()))  # refuses a parameter that is in two groups


@pytest.mark.parametrize("rates, words", [
    ({"memory": 1e-4}, "no rate for encoder"), ({"": 1e-4, "backbone": 0}, "no parameter lies in 'backbone'"),
])
def test_rates_that_leave_something_out_or_name_nothing_are_refused(tiny, rates, words):
    with pytest.raises(ValueError, match=words):
        rate_groups(tiny, rates)


def test_the_frozen_norms_of_a_published_model_stay_frozen():
    model = detr(ResNet("resnet18", pretrained=False), 5, 7, 32, 4, 1, 1, 48)
    stem = {name for name, p in model.named_parameters() if not p.requires_grad}
    learning = {id(p) for group in rate_groups(model, {"": 1e-4}) for p in group["params"]}
    assert stem and not any(id(p) in learning for name, p in model.named_parameters() if name in stem)
    assert any(isinstance(part, FrozenBatchNorm2d) for part in model.modules())


# --- out again ----------------------------------------------------------------------------------------------------
def dilated() -> DETR:
    torch.manual_seed(0)
    return detr_resnet50_dc5(**SMALL).eval()


def last_layer_only() -> DETR:
    torch.manual_seed(0)
    return detr_resnet50(**SMALL, aux_loss=False).eval()


EXPORTED = {
    "official": lambda: Reference("detr_r18_small").model(), "dilated": dilated, "tiny": lambda: detr_tiny().eval(),
    "last layer only": last_layer_only,
}
every_exported = pytest.mark.parametrize("build", EXPORTED.values(), ids=EXPORTED)
UNSEEN = [((203, 251), (150, 217)), ((192, 256),), ((65, 333), (100, 90), (64, 70))]


def unseen() -> list[tuple[Tensor, Tensor]]:
    """Batches of other numbers and sizes than the example that a graph is recorded with."""
    return [batch("image5_", *sizes) for sizes in UNSEEN]


def compare_graph(model: DETR, predict: object, tolerance: float) -> None:
    for images, pad in unseen():
        with torch.no_grad():
            expected, blind = (LastLayer(model)(images, mask) for mask in (pad, torch.zeros_like(pad)))
        ours = [torch.as_tensor(value) for value in predict(images, pad)]
        close(ours, list(expected), atol=tolerance, rtol=0)
        if pad.any():
            assert (blind[0] - expected[0]).abs().max() > 10 * tolerance, "the mask makes no difference here"


@pytest.mark.slow
@every_exported
def test_a_recorded_graph_predicts_what_the_model_predicts(build, tmp_path):
    model = build()
    torch.export.save(export_program(model), tmp_path / "model.pt2")
    compare_graph(model, torch.export.load(tmp_path / "model.pt2").module(), 1e-5)


@pytest.mark.slow
@every_exported
def test_onnx_predicts_what_the_model_predicts(build, tmp_path):
    import onnxruntime

    model = build()
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx"))
    assert {place.name: place.shape for place in session.get_inputs()} == {
        "images": ["batch", 3, "height", "width"], "pad": ["batch", "height", "width"]}
    compare_graph(model, lambda images, pad: session.run(
        ["logits", "boxes"], {"images": images.numpy(), "pad": pad.numpy()}), 5e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_class_names_travel_with_onnx(tmp_path):
    import onnx

    model = detr_tiny()
    for names in (None, ["a cat", "Käfer"]):
        model.names = names
        found = {prop.key: prop.value for prop in onnx.load(export_onnx(model, tmp_path / "a.onnx")).metadata_props}
        assert json.loads(found.get("names", "null")) == names


@pytest.mark.slow
def test_recording_leaves_the_model_and_the_type_checker_as_they_were():
    model = detr_tiny().train()
    model.encoder.eval()
    modes = [part.training for part in model.modules()]
    before = deepcopy(model.state_dict())
    program = export_program(model)
    model.decoder.head.classes.bias.data.add_(1)
    assert [part.training for part in model.modules()] == modes
    assert not torch.equal(program.state_dict["model.decoder.head.classes.bias"], model.decoder.head.classes.bias)
    close(dict(program.state_dict), {f"model.{name}": before[name] for name in
                                     (key.removeprefix("model.") for key in program.state_dict)})
    with pytest.raises(ValueError, match="images must be one batch"):
        export_program(WrongImages(model))
    assert jaxtyping.config.jaxtyping_disable is False


class WrongImages(nn.Module):
    """Hands its detector something else than a batch of images."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, pad: Tensor) -> Output:
        return self.model(images[0], pad)


@pytest.mark.slow
def test_the_packages_that_onnx_needs_are_named(tmp_path):
    code = ("import sys\nsys.modules['onnxscript'] = None\n"  # as if it were not installed
            "from detr_nb import detr_tiny, export_onnx\n"
            f"try:\n    export_onnx(detr_tiny(), {str(tmp_path / 'a.onnx')!r})\n"
            "except ModuleNotFoundError as error:\n    print(error)")
    assert run_alone(code) == "writing ONNX needs onnxscript: pip install onnx onnxscript"
    assert not (tmp_path / "a.onnx").exists()


def run_alone(code: str) -> str:
    """What a program of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parents[1])
    return done.stdout.strip()


@pytest.mark.slow
def test_graphs_are_recorded_under_the_type_checker_too():
    code = ("from jaxtyping import install_import_hook\n"
            "install_import_hook('detr_nb', 'beartype.beartype')\n"
            "import torch\nfrom detr_nb.model import detr_tiny\nfrom detr_nb.pretrained import export_program\n"
            "images = torch.zeros(1, 3, 70, 90)\n"
            "logits, boxes = export_program(detr_tiny()).module()(images, images[:, 0] > 0)\n"
            "print(*boxes.shape)\n"
            "try:\n    detr_tiny()(images, 'no mask')\nexcept Exception as error:\n"
            "    print(type(error).__name__)")
    assert run_alone(code).split() == ["1", "16", "4", "TypeCheckError"]
