"""Values that nobody means are refused where they enter, by field, value and what is allowed, or read right."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import fault
from jaxtyping import config as type_checks
from torch import nn
from torchvision.transforms import v2

from detr_nb.boxes import masks_to_boxes
from detr_nb.cache import render_scenes
from detr_nb.cli import main
from detr_nb.clinic import diagnose
from detr_nb.config import ConfigError, load_words, text_config
from detr_nb.data import Preprocess, collate
from detr_nb.errors import confusion_matrix, error_breakdown, pr_curve
from detr_nb.evaluation import coco_evaluate, evaluate
from detr_nb.explorables import (
    Attention,
    AttentionView,
    Film,
    Layers,
    Matching,
    TwoBoxes,
)
from detr_nb.export import export_onnx
from detr_nb.finetuning import FineTuned, replace_head, resize_queries
from detr_nb.formats import Sizes
from detr_nb.hub import describe, read_description
from detr_nb.loading import Augmented, DataConfig, MemoryDataset, ShapesData
from detr_nb.losses import SetCriterion
from detr_nb.matcher import HungarianMatcher
from detr_nb.model import (
    DETRConfig,
    DETRDemo,
    ResNetConfig,
    TinyConfig,
    TinyModel,
    detr_tiny,
    postprocess,
)
from detr_nb.notation import toy_output, toy_targets
from detr_nb.optimizer import freeze, rate_groups
from detr_nb.shapes import DEFAULT, EASY, SceneConfig, Scenes, make_scene
from detr_nb.training import TrainConfig, read_config

NAN = float("nan")


@pytest.fixture(autouse=True)
def without_type_checker():
    """People do not run the checker of types that the other tests have: it would refuse some values before us."""
    type_checks.update("jaxtyping_disable", True)
    yield
    type_checks.update("jaxtyping_disable", False)


# --- flags --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("flags", "complaint"), [
    fault("--steps 0", ["--steps", "0"], "steps is 0: it must be a whole number of at least 1"),
    fault("--epochs 0", ["--epochs", "0"], "epochs is 0: it must be"),
    fault("--steps -5", ["--steps", "-5"], "steps is -5: it must be"),
    fault("--epochs -1", ["--epochs", "-1"], "epochs is -1: it must be"),
    fault("--minutes -1", ["--minutes", "-1"], "minutes is -1: it must be"),
    fault("--batch_size -1", ["--batch_size", "-1"], "batch_size is -1: it must be"),
    fault("--log_every 0", ["--log_every", "0"], "log_every is 0: it must be"),
    fault("--accumulate 0 / -1", ["--accumulate", "0"], "accumulate is 0: it must be"),
    fault("--accumulate 0 / -1", ["--accumulate", "-1"], "accumulate is -1: it must be"),
    fault("--lr_muon -0.01", ["--lr_muon", "-0.01"], "lr_muon is -0.01: it must be"),
    fault("--lr_backbone -0.01", ["--lr_backbone", "-0.01"], "lr_backbone is -0.01: it must be"),
    fault("--clip -1", ["--clip", "-1"], "clip is -1: it must be a number above 0"),
    fault("--clip 0", ["--clip", "0"], "clip is 0: it must be a number above 0"),
    fault("--weight_decay -50", ["--weight_decay", "-50"], "weight_decay is -50: it must be"),
    fault("--beta2 1.5", ["--beta2", "1.5"], "beta2 is 1.5: it must be"),
    fault("--beta2 -1", ["--beta2", "-1"], "beta2 is -1: it must be"),
    fault("--final_weight_ce 0 (documented: above 0)", ["--final_weight_ce", "0"], "final_weight_ce is 0: it must be"),
    fault("--weight_ce 0", ["--weight_ce", "0"], "weight_ce is 0: it must be"),
    fault("--weight_ce -1", ["--weight_ce", "-1"], "weight_ce is -1: it must be"),
    fault("--weight_bbox -5", ["--weight_bbox", "-5"], "weight_bbox is -5: it must be"),
    fault("--cost_bbox -5", ["--cost_bbox", "-5"], "cost_bbox is -5: it must be"),
    fault("--no_object_weight -1", ["--no_object_weight", "-1"], "no_object_weight is -1: it must be"),
    fault("--ema 1", ["--ema", "1"], "ema is 1: it must be a number of at least 0 and below 1"),
    *[fault("--scales [[0.7, 0]], -1, 0.001", ["--scales", f"[[0.7, {share}]]"], f"scales[0][1] is {share}: it must be")
      for share in ("0", "-1", "0.001")],
    fault("--seed -1", ["--seed", "-1"], "seed is -1: it must be"),
    fault("--seed 10^30", ["--seed", str(10**30)], f"seed is {10**30}: it must be"),
    fault("--model.enc_layers -1, dim_feedforward 0", ["--model.enc_layers", "-1"], "model.enc_layers is -1"),
    fault("--model.enc_layers -1, dim_feedforward 0", ["--model.dim_feedforward", "0"], "model.dim_feedforward is 0"),
    *[fault("--model.num_queries 0", ["--model", kind, "--model.num_queries", "0"], "model.num_queries is 0")
      for kind in ("TinyModel", "FineTuned")],
    *[fault("--model.dec_layers 0, -1", ["--model.dec_layers", count], f"model.dec_layers is {count}")
      for count in ("0", "-1")],
    fault("--model.temperature 0", ["--model.temperature", "0"], "model.temperature is 0"),
    fault("--epochs 1 --minutes 0.02 --steps 3", ["--epochs", "1", "--minutes", "0.02", "--steps", "3"],
          "--epochs is given beside --steps: give one of the two"),
    (["--data", "evil.Data"], "data.kind is 'evil.Data': it must be one of CocoData"),
    (["--model", "this.X"], "model.kind is 'this.X': it must be one of AnchorDETR"),
    (["--steps", "four"], "steps is 'four': it must be a whole number of at least 1 and at most 1000000000"),
    (["--stepz", "4"], "--stepz is unknown: did you mean --steps?"),
    (["--steps"], "--steps is wrong: expected one argument"), (["4"], "4 is unknown: see --help"),
    (["--bf16", "2"], "bf16 is 2: it must be true or false"), (["--lr", ".nan"], "lr is nan: it must be"),
    (["--trackers", "7"], "trackers is 7: it must be a list"), (["--data.cache", "a\0b"], "data.cache is 'a\\x00b'"),
    (["--lr", "[1"], "lr is no YAML: line 1"), (["--cost_class", "0", "--cost_bbox", "0", "--cost_giou", "0"],
                                               "cost_class is 0, and so are cost_bbox and cost_giou"),
    (["--config", "missing.yaml"], "--config is missing.yaml: there is no such file"),
    (["--plugin", "no_such_module"], "--plugin is 'no_such_module', which cannot be imported"),
])
def test_a_flag_is_refused_by_name(flags, complaint, capsys):
    with pytest.raises(ConfigError) as caught:
        read_config(flags)
    assert str(caught.value).startswith(complaint), str(caught.value)
    assert main(["train", *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"detr-nb: {complaint}") and said.err.count("\n") == 1


@pytest.mark.parametrize(("flags", "complaint"), [
    fault("--data.sizes.crop [5]", ["--data.sizes.crop", "[5]"], "data.sizes.crop[0] is 5: it must be"),
    fault("--data.sizes.crop [5]", ["--data.sizes.crop", "[50]"], "data.sizes.crop is [50]: it must be [], or"),
    fault("--data.sizes.crop [0, 0]", ["--data.sizes.crop", "[0, 0]"], "data.sizes.crop[0] is 0: it must be"),
    *[fault("short_sides [], [0]; crop [60, 30]; before_crop []; longest 0; workers -1", *row) for row in (
        (["--data.sizes.short_sides", "[]"], "data.sizes.short_sides is []: it must have at least 1 entries"),
        (["--data.sizes.short_sides", "[0]"], "data.sizes.short_sides[0] is 0: it must be"),
        (["--data.sizes.crop", "[60, 30]"], "data.sizes.crop is [60, 30]: it must be"),
        (["--data.sizes.before_crop", "[]"], "data.sizes.before_crop is []: it must have"),
        (["--data.sizes.longest", "0"], "data.sizes.longest is 0: it must be"),
        (["--data.workers", "-1"], "data.workers is -1: it must be"))],
])
def test_sizes_of_photographs_are_refused_by_name(flags, complaint):
    places = [word for name in ("train", "train_file", "val", "val_file") for word in (f"--data.{name}", "x")]
    with pytest.raises(ConfigError) as caught:
        read_config(["--data", "CocoData", *places, *flags])
    assert str(caught.value).startswith(complaint), str(caught.value)


def test_a_text_stays_a_text_and_a_flag_takes_the_place_of_another_length(tmp_path):
    found = read_config(["--folder", "7", "--progress", "no", "--lr", "1e-4", "--steps", "1e3"])
    assert (found.folder, found.progress, found.lr, found.steps) == ("7", False, 1e-4, 1000)
    assert type(found.steps) is int and read_config(["--folder=2024-01-01"]).folder == "2024-01-01"
    (tmp_path / "a.yaml").write_text("minutes: 5\nsteps: 70\n")
    words = ["--config", str(tmp_path / "a.yaml")]
    assert read_config([*words, "--steps", "4"]) == TrainConfig(steps=4)
    assert read_config([*words, "--epochs", "2"]) == TrainConfig(epochs=2)
    assert read_config(words) == TrainConfig(minutes=5, steps=70)


@pytest.mark.parametrize("words", [
    fault("eval --batch_size 0", "0"), fault("eval --batch_size -1", "-1"), "10000000000", "2.5", "no",
])
def test_eval_refuses_a_batch_that_is_none(words, capsys):
    assert main(["eval", "runs/x", f"--batch_size={words}"]) == 2
    assert capsys.readouterr().err.startswith("detr-nb: batch_size is ")


# --- files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("content", "complaint"), [
    fault("--config that is not UTF-8", b"folder: caf\xe9\n", "whose byte 11 is not UTF-8: save it as UTF-8 text"),
    fault("steps twice in one file", b"steps: 3\nlr: 0.1\nsteps: 5\n", "steps stands there twice: keep one of them"),
    (b"", "is None: it must be lines of names and values"), (b"# only a comment\n", "is None: it must be lines"),
    (b"- 1\n- 2\n", "it must be lines of names and values"), (b"steps: [\n", "is no YAML: line 2"),
    (b"steps: !!python/object:os.system {}\n", "is no YAML: line 1"), (b"steps: '4'\n", "steps is '4': it must be"),
    (b"steps:\t4\n\tlr: 1\n", "is no YAML"), (b"steps: null\n", "steps is None: it must be"),
    (b"folder: ~\n", "folder is None: it must be text"), (b"folder: 7\n", "folder is 7: it must be text"),
    (b"bf16: 1\n", "bf16 is 1: it must be true or false"), (b"a: &a [1]\ndrops: *a\n", "write the part out"),
    (b"stepz: 4\n", "stepz is unknown: TrainConfig has"), (b"[" * 5000, "is nested too deeply"),
    (b"steps: " + b"9" * 5000, "too many digits"), (b"model: Smal\n", "model.kind is 'Smal': it must be one of"),
    (b"data: {class_path: ShapesData, train_images: 3}\n", "train_images is unknown beside class_path"),
    (b"epochs: 2\nminutes: 3\n", "epochs is 2 and minutes is 3: give one"), (b"1: 2\n", "1 is unknown"),
])
def test_a_file_is_refused_by_name_and_so_is_what_it_says(content, complaint, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    assert main(["train", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said and complaint in said and said.count("\n") == 1, said


def test_a_file_of_windows_and_a_folder(tmp_path):
    (tmp_path / "a.yaml").write_bytes("﻿steps: 3\r\nfolder: käfer\r\n".encode())
    assert read_config(["--config", str(tmp_path / "a.yaml")]) == TrainConfig(steps=3, folder="käfer")
    with pytest.raises(ConfigError, match="it is a folder"):
        read_config(["--config", str(tmp_path)])
    assert load_words("{a: yes, b: 0x10, c: 1:30, d: 010, e: 1_000, f: 5., g: .5, h: -.inf}") == {
        "a": True, "b": "0x10", "c": "1:30", "d": "010", "e": "1_000", "f": 5.0, "g": 0.5, "h": float("-inf")}


@pytest.mark.fault("YAML folder: ~/runs/x")
@pytest.mark.fault("YAML out: ~/found_x")
def test_the_home_folder_is_found_from_files_python_and_flags(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    from detr_nb.cli import Predict

    assert text_config(TrainConfig, "folder: ~/runs/x").folder == str(tmp_path / "runs" / "x")
    read = text_config(Predict, "images: [~/a.png]\nout: ~/found_x")
    assert read == Predict((tmp_path / "a.png",), out=tmp_path / "found_x")
    assert ShapesData(cache="~/c").cache == str(tmp_path / "c") and FineTuned("~/w").weights == str(tmp_path / "w")
    assert read_config(["--folder", "~/runs/x"]).folder == str(tmp_path / "runs" / "x")


@pytest.mark.fault("folder=Path('mine')")
def test_python_may_give_a_path_or_numbers_of_numpy():
    made = TrainConfig(folder=Path("mine"), steps=np.int64(5), lr=np.float32(0.5))
    assert made == TrainConfig(folder="mine", steps=5, lr=0.5) and json.dumps(made.plain())
    for wrong in ({"folder": 7}, {"data": 7}, {"steps": "4"}, {"progress": 1}, {"model": "Smal"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TrainConfig(**wrong)


# --- strangers' configurations ------------------------------------------------------------------------------------
INNOCENT = "import pathlib\npathlib.Path(r'{}').write_text('executed')\n"


@pytest.mark.parametrize("where", [
    fault("eval of a stranger's run folder whose config.yaml says class_path: innocent.X, module on sys.path", "eval"),
    fault("the same, innocent.py lies INSIDE the stranger's folder, `python -c main(['eval', ...])`", "inside"),
    fault("the same by read_config, sys.path holds '' (as notebooks have it)", "read"),
])
def test_a_run_folder_imports_nothing(where, tmp_path, monkeypatch, capsys):
    (tmp_path / "innocent.py").write_text(INNOCENT.format(tmp_path / "trace"))
    for field in ("data", "model"):
        (tmp_path / "config.yaml").write_text(f"{field}:\n  class_path: innocent.X\n  init_args: {{}}\n")
        monkeypatch.syspath_prepend("" if where != "eval" else str(tmp_path))
        monkeypatch.chdir(tmp_path if where != "inside" else tmp_path.parent)
        if where == "read":
            with pytest.raises(ConfigError, match=f"{field}.kind is 'innocent.X': it must be one of .*--plugin"):
                read_config(["--config", "config.yaml"])
        else:
            assert main(["eval", str(tmp_path)]) == 2
            assert f"{field}.kind is 'innocent.X': it must be one of" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists() and "innocent" not in sys.modules


@pytest.mark.fault("class_path: this.X")
@pytest.mark.parametrize("word", ["this.X", "antigravity.X", "os.system", "detr_nb.cli.main", "torch.nn.Linear"])
def test_no_module_of_python_is_imported_or_called(word, capsys):
    before = set(sys.modules)
    for text in (f"data: {{class_path: {word}}}", f"model: {word}", f"model: {{kind: {word}, x: 1}}"):
        with pytest.raises(ConfigError, match="kind is"):
            text_config(TrainConfig, text)
    assert not {"this", "antigravity"} & (set(sys.modules) - before) and capsys.readouterr().out == ""


MINE = """
from dataclasses import dataclass
from detr_nb.loading import ShapesData

@dataclass(frozen=True)
class MineOfTheTest(ShapesData):
    \"\"\"Scenes.

    Args:
        extra: a number.
    \"\"\"
    extra: int = 0
"""


@pytest.mark.parametrize("by_name", [True, False], ids=["a module", "a file"])
def test_classes_of_ones_own_come_by_plugin_or_import(by_name, tmp_path, monkeypatch):
    name = f"mine_of_{'module' if by_name else 'file'}"
    (tmp_path / f"{name}.py").write_text(MINE)
    if by_name:
        monkeypatch.syspath_prepend(str(tmp_path))
    plugin = name if by_name else str(tmp_path / f"{name}.py")
    found = read_config(["--plugin", plugin, "--data", f"{name}.MineOfTheTest", "--data.extra", "4"])
    assert type(found.data).__name__ == "MineOfTheTest" and found.data.extra == 4
    text = f"data: {{class_path: {name}.MineOfTheTest, init_args: {{extra: 5}}}}"
    assert text_config(TrainConfig, text).data.extra == 5, "it is registered now, as after an import"
    (tmp_path / "broken.py").write_text("1/0")
    with pytest.raises(ConfigError, match="cannot be imported .ZeroDivisionError"):
        read_config([f"--plugin={tmp_path / 'broken.py'}"])


@pytest.mark.fault("config.json enc_layers 10^7 (835 B)")
def test_a_description_costs_nothing_before_it_is_refused():
    words = describe(detr_tiny())
    huge = {"hidden_dim": 65536, "dim_feedforward": 65536, "enc_layers": 100, "nheads": 4}
    for change in ({"enc_layers": 10**7}, huge, {"num_queries": 10**9}, {"hidden_dim": 130}, {"nheads": 0},
                   {"backbone": {**words["backbone"], "widths": [65536] * 3}},
                   {"backbone": {**words["backbone"], "strides": [3, 8, 8]}}):
        with pytest.raises(ConfigError, match="|".join(change)):
            read_description({**words, **change})


# --- pairs and ranges in Python -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("make", "complaint"), [
    fault("clutter 10^9", lambda: replace(EASY, clutter=10**9), "clutter is 1000000000: it must be"),
    fault("size 10^6", lambda: replace(EASY, size=10**6), "size is 1000000: it must be"),
    fault("size 64.5, '64'; seed -1; workers -1; count 10^13", lambda: SceneConfig(size=64.5), "size is 64.5"),
    fault("size 64.5, '64'; seed -1; workers -1; count 10^13", lambda: SceneConfig(size="64"), "size is '64'"),
    fault("size 64.5, '64'; seed -1; workers -1; count 10^13", lambda: Scenes(EASY, 1, -1), "Scenes.seed is -1"),
    fault("size 64.5, '64'; seed -1; workers -1; count 10^13", lambda: Scenes(EASY, 10**13, 0), "Scenes.count is"),
    fault("size 64.5, '64'; seed -1; workers -1; count 10^13", lambda: render_scenes(Scenes(EASY, 1, 0), workers=-1),
          "render_scenes.workers is -1"),
    fault("min_objects 50 with large boxes and no overlap",
          lambda: make_scene(replace(DEFAULT, min_side=0.4, min_objects=50, max_objects=50, max_overlap=0), 0, 0),
          "min_objects is 50: scene 0 of seed 0 has room for"),
    fault("detr_tiny(temperature=-1)", lambda: detr_tiny(temperature=-1), "temperature is -1: it must be"),
    fault("Preprocess(std NaN, mean NaN)", lambda: Preprocess(std=(NAN, 1, 1)), "std[0] is nan: it must be"),
    fault("Preprocess(std NaN, mean NaN)", lambda: Preprocess(mean=(NAN, 1, 1)), "mean[0] is nan: it must be"),
    *[fault("Preprocess(short_side NaN, 1.5, '800', size 64, longest 1)", *row) for row in (
        (lambda: Preprocess(NAN), "short_side is nan"), (lambda: Preprocess(1.5), "short_side is 1.5"),
        (lambda: Preprocess("800"), "short_side is '800'"),
        (lambda: Preprocess(size=64), "size is 64: it must be a list"),
        (lambda: Preprocess(longest=1), "longest is 1: it must be a whole number of at least 2"),
        (lambda: Preprocess(1), "short_side is 1: it must be"), (lambda: Preprocess(size=(2, 1)), "size[1] is 1: it"))],
    (lambda: Preprocess(size=(40000, 40000)), "size[0] is 40000: it must be a whole number of at least 2"),
    (lambda: Preprocess(mean=("a", "b", "c")), "mean[0] is 'a': it must be a number"),
    (lambda: Preprocess(size=(1.5, 64)), "size[0] is 1.5"), (lambda: Preprocess(std=(1, 1)), "std is (1, 1)"),
    (lambda: ShapesData(replace(EASY, size=8192), 10**6), "train_images is 1000000: with val_images=500 and"),
    (lambda: DETRConfig(hidden_dim=100, nheads=8), "hidden_dim is 100: it must be a multiple of 4 and of nheads=8"),
    (lambda: TinyModel(strides=(4, 8)), "strides is (4, 8): it must be 3 numbers"),
    (lambda: TinyConfig((8, 8), (4, 6)), "strides is (4, 6): it must be 2 numbers"),
    (lambda: ResNetConfig("vgg16"), "name is 'vgg16': it must be 'resnet18'"),
    (lambda: ResNetConfig("resnet18", True), "dilation is True: resnet18 cannot dilate"),
    (lambda: Sizes(eval_side=10**5), "eval_side is 100000"), (lambda: detr_tiny(num_classes=2.5), "num_classes is 2.5"),
    (lambda: detr_tiny(num_classes=10**9), "num_classes is 1000000000"),
    fault("cost_bbox -5", lambda: HungarianMatcher(cost_bbox=-5), "HungarianMatcher.cost_bbox is -5: it must be"),
    (lambda: HungarianMatcher(cost_class=NAN), "HungarianMatcher.cost_class is nan"),
    (lambda: HungarianMatcher(cost_giou="2"), "HungarianMatcher.cost_giou is '2'"),
    (lambda: SetCriterion(-1), "SetCriterion.num_classes is -1"),
    (lambda: SetCriterion(2.5), "SetCriterion.num_classes"),
    (lambda: SetCriterion(3, no_object_weight=-1), "SetCriterion.no_object_weight is -1"),
    (lambda: SetCriterion(3).reweigh("loss_ce", NAN), "loss_ce is nan"),
    (lambda: SetCriterion(3).reweigh("loss_x", 1), "loss_x weighs None"),
])
def test_python_is_told_which_value_is_wrong(make, complaint):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(complaint), str(caught.value)


def test_the_smallest_frame_can_be_made_of_every_picture():
    for shape in ((48, 64), (1, 1), (3, 1), (1, 3000)):
        for preprocess in (Preprocess(longest=2), Preprocess(2), Preprocess(size=(2, 2))):
            assert min(preprocess(torch.zeros(3, *shape, dtype=torch.uint8)).shape) >= 1


@pytest.mark.fault("all parts frozen")
def test_something_must_be_left_to_learn():
    with pytest.raises(ConfigError, match=r"frozen is .*: nothing is left that could learn"):
        FineTuned(frozen=("memory", "encoder", "queries", "decoder")).build(3)
    built = FineTuned(num_queries=5, frozen=("memory",)).build(3)
    assert built.training and built.queries.count == 5 and built.num_classes == 3


# --- targets ------------------------------------------------------------------------------------------------------
BOX = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
LABELS = "labels as list, numpy, None; target without labels; list for a target"


@pytest.mark.parametrize("target", [
    fault("labels of bool, complex", {"labels": torch.tensor([True]), "boxes": BOX}),
    fault("labels of bool, complex", {"labels": torch.tensor([1j]), "boxes": BOX}),
    {"labels": torch.tensor([1.0]), "boxes": BOX}, {"labels": torch.tensor(1), "boxes": BOX},
    fault("boxes in pixels, shares above 1", {"labels": torch.tensor([1]), "boxes": 64 * BOX}),
    {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 1.1, 0.2]])},
    {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, NAN, 0.1, 0.2]])},
    fault(LABELS, {"labels": [1], "boxes": BOX}), fault(LABELS, {"labels": np.array([1]), "boxes": BOX}),
    fault(LABELS, {"labels": None, "boxes": BOX}), fault(LABELS, {"boxes": BOX}), fault(LABELS, [BOX]),
    fault("boxes as list; on meta", {"labels": torch.tensor([1]), "boxes": BOX.tolist()}),
    fault("boxes as list; on meta", {"labels": torch.tensor([1]), "boxes": BOX.to("meta")}),
    {"labels": torch.tensor([1]), "boxes": BOX.T}, {"labels": torch.tensor([1, 1]), "boxes": BOX},
])
def test_a_target_that_is_none_is_refused_by_its_image(target):
    out, targets = toy_output(), [*toy_targets()]
    targets[0] = {**target, "image_id": 7} if isinstance(target, dict) else target
    name = "image 7" if isinstance(target, dict) else "image number 0 of the batch"
    for judge in (HungarianMatcher(), SetCriterion(out.logits.shape[-1] - 1)):
        with pytest.raises(ValueError, match=name):
            judge(out, targets)


def test_targets_of_other_number_types_are_read():
    out, targets = toy_output(), toy_targets()
    expected = HungarianMatcher()(out, targets)
    for kind in (torch.int8, torch.int16, torch.uint8):
        for boxes in (torch.float64, torch.float32):
            changed = [{**one, "labels": one["labels"].to(kind), "boxes": one["boxes"].to(boxes)} for one in targets]
            assert str(HungarianMatcher()(out, changed)) == str(expected)


@pytest.mark.fault("all empty, no_object_weight 0")
def test_nothing_to_learn_and_no_weight_of_nothing_is_no_nan():
    out = toy_output()
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    criterion = SetCriterion(out.logits.shape[-1] - 1, no_object_weight=0)
    losses = criterion(out, [empty] * out.boxes.shape[1])
    assert criterion.total(losses) == 0 and all(value.isfinite() for value in losses.values())


def test_a_weight_of_zero_can_be_given_and_taken_back():
    criterion = SetCriterion(3)
    criterion.reweigh("loss_ce", 0)
    criterion.reweigh("loss_ce", 2)
    assert criterion.all_weights["loss_ce"] == 2


# --- models and pictures ------------------------------------------------------------------------------------------
@pytest.mark.fault("0 x 64, 1 x 1 pixels, no image, double, half")
@pytest.mark.parametrize(("images", "complaint"), [
    (torch.zeros(1, 3, 0, 64), "at least 4 x 4 pixels"), (torch.zeros(1, 3, 1, 1), "at least 4 x 4 pixels"),
    (torch.zeros(0, 3, 64, 64), "images must be at least one"),
    (torch.zeros(1, 3, 32, 32).double(), r"call images.to\(torch.float32\)"),
    (torch.zeros(1, 3, 32, 32).half(), r"call images.to\(torch.float32\)"),
])
def test_images_that_are_none_are_refused(images, complaint):
    with pytest.raises(ValueError, match=complaint):
        detr_tiny()(images)


@pytest.mark.parametrize("sizes", [
    fault("three numbers", [(6, 8, 3)]), [(6, -8)], [(0, 8)], [(6, NAN)], [("6", "8")], [6], torch.tensor([[6.5, 8.0]]),
])
def test_sizes_of_pictures_are_refused_by_name(sizes):
    with pytest.raises(ValueError, match="sizes"):
        postprocess(toy_output(), sizes)


@pytest.mark.fault("masks_to_boxes of uint8 ones")
def test_a_mask_of_bytes_is_a_mask():
    masks = torch.zeros(1, 5, 6, dtype=torch.uint8)
    masks[0, 1:3, 2:5] = 1
    assert masks_to_boxes(masks).tolist() == masks_to_boxes(masks * 255).tolist() == [[2, 1, 4, 2]]


@pytest.mark.parametrize(("make", "complaint"), [
    fault("MemoryDataset with one id for three classes", lambda: memory(ids=[1]), "category_ids are 1 numbers"),
    (lambda: memory(ids=[1, 1, 2]), "category_ids are 3 numbers, 2 of them different"),
    (lambda: memory(ids=["a", 1, 2]), "category_ids[0] is 'a': it must be"),
    (lambda: memory(names=["a", 2, "c"]), "names[1] is 2: it must be text"),
    (lambda: collate([None]), "sample 0 of the batch is NoneType"),
    (lambda: collate([(torch.zeros(3, 8, 8, dtype=torch.uint8), [])]), "sample 0 of the batch is Tensor, list"),
    (lambda: collate([(torch.zeros(3, 8, 8), {})]), "sample 0 of the batch: the image is torch.float32"),
    (lambda: Augmented([1, 2], None), "Augmented(list, NoneType): give a dataset"),
    (lambda: Augmented(memory(), "flip"), "Augmented(MemoryDataset, str): give"),
    (lambda: Augmented(memory(), v2.Identity(), workers=-1), "Augmented.workers is -1"),
    (lambda: memory().loader(0), "MemoryLoader.batch_size is 0"),
    fault("batch -1", lambda: evaluate(detr_tiny(), memory(), batch_size=-1), "evaluate.batch_size is -1"),
])
def test_a_data_set_is_refused_by_name(make, complaint):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(complaint), str(caught.value)


def memory(names=("a", "b", "c"), ids=None) -> MemoryDataset:
    """One black picture without objects."""
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    return MemoryDataset(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [empty], list(names), ids)


@pytest.mark.fault("replace_head True, '3', DETRDemo")
@pytest.mark.parametrize(("change", "words"), [
    (lambda model: replace_head(model, True), "replace_head.num_classes is True: it must be a whole number"),
    (lambda model: replace_head(model, "3"), "replace_head.num_classes is '3': it must be"),
    (lambda model: replace_head(model, 0), "replace_head.num_classes is 0: it must be"),
    (lambda model: replace_head(model, 3, {0: 99}), "old classes in keep must be from 0 to 5, got [99]"),
    (lambda model: replace_head(model, 3, {5: 0}),
     "new classes in keep must be different numbers from 0 to 2, got [5]"),
    (lambda model: resize_queries(model, 0), "resize_queries.n is 0: it must be"),
    (lambda model: resize_queries(model, 2.5), "resize_queries.n is 2.5: it must be"),
    (lambda model: resize_queries(model, 4, ["a"]), "old queries in keep[0] is 'a': it must be"),
    (lambda model: resize_queries(model, 4, [0, 0]),
     "old queries in keep must be different numbers from 0 to 15, got [0, 0]"),
    (lambda model: freeze(model, "memory", "no such part"), "no parameter lies in 'no such part'"),
    (lambda model: rate_groups(model, {"": 1e-4, "memory": -1}), "the rate of 'memory' is -1: it must be"),
    (lambda model: rate_groups(model, {"": NAN}), "the rate of '' is nan: it must be"),
    (lambda model: rate_groups(model, {"memory": 0}), "no rate for encoder."),
    (lambda model: rate_groups(model, {"": "fast"}), "the rate of '' is 'fast': it must be"),
])
def test_a_model_stays_as_it_was_if_it_cannot_be_changed(change, words):
    model = detr_tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        change(model)
    assert str(caught.value).startswith(words)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.num_classes == 6


@pytest.mark.fault("replace_head True, '3', DETRDemo")
def test_the_demonstration_model_cannot_be_changed():
    demo = DETRDemo(3, 8, 2, 1, 1)
    for change in (lambda: replace_head(demo, 3), lambda: resize_queries(demo, 3)):
        with pytest.raises(ValueError, match="which DETRDemo does not"):
            change()
    with pytest.raises(ValueError, match="hidden_dim is 10: it must be a multiple of 4"):
        DETRDemo(3, 10, 2, 1, 1)


# --- caches, exports, figures -------------------------------------------------------------------------------------
BROKEN = "cache images cut off / targets cut off / empty / pickle"
OTHER = "cache with other shape or 2 of 6 images"


@pytest.mark.parametrize("damage", [
    fault(BROKEN, lambda images, targets: images.write_bytes(images.read_bytes()[:200])),
    fault(BROKEN, lambda images, targets: targets.write_bytes(targets.read_bytes()[:100])),
    fault(BROKEN, lambda images, targets: images.write_bytes(b"")),
    fault(BROKEN, lambda images, targets: targets.write_bytes(b"")),
    fault(BROKEN, lambda images, targets: np.save(images, np.array([{"a": 1}], dtype=object), allow_pickle=True)),
    fault(BROKEN, lambda images, targets: torch.save([1, 2], targets)),
    fault(OTHER, lambda images, targets: np.save(images, np.zeros((6, 3, 8, 8), np.uint8))),
    fault(OTHER, lambda images, targets: np.save(images, np.load(images)[:2])),
    fault(OTHER, lambda images, targets: torch.save({**torch.load(targets), "counts": torch.zeros(6).long()}, targets)),
])
def test_a_cache_that_is_broken_or_of_another_is_drawn_again(damage, tmp_path):
    scenes = Scenes(replace(EASY, size=16, min_side=0.3), 6, 0)
    images, targets = render_scenes(scenes, tmp_path, workers=1)
    kept = images.clone()
    del images
    damage(next(tmp_path.glob("*.npy")), next(tmp_path.glob("*.pt")))
    with pytest.warns(UserWarning, match="drawn again"):
        again, truth = render_scenes(scenes, tmp_path, workers=1)
    assert torch.equal(again, kept) and len(truth) == len(targets) == 6


@pytest.mark.parametrize(("model", "place", "kind", "words"), [
    fault("export_onnx into a missing folder, onto a folder", detr_tiny, "no/such/a.onnx", FileNotFoundError,
          "no/such/a.onnx lies in no folder: make no/such first"),
    fault("export_onnx into a missing folder, onto a folder", detr_tiny, ".", IsADirectoryError,
          ". is a folder: name a file in it"),
    fault("export_onnx of a Linear, None", lambda: nn.Linear(3, 3), "a.onnx", ValueError,
          "Linear takes (input): give a detector"),
    fault("export_onnx of a Linear, None", lambda: None, "a.onnx", ValueError, "NoneType is no model: give a detector"),
])
def test_what_cannot_be_exported_is_said_before_the_minutes_of_it(model, place, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("detr_nb.export.export_program", lambda *_: pytest.fail("it began"))
    with pytest.raises(kind) as caught:
        export_onnx(model(), place)
    assert str(caught.value).startswith(words)


@pytest.mark.fault("Matching label 9, Layers(), Gaze(), Film(), Attention query 99 / heads 3, TwoBoxes of two numbers")
@pytest.mark.parametrize(("make", "complaint"), [
    (lambda: Matching(targets=[{"box": [0.5, 0.5, 0.1, 0.1], "label": 9}]), "Matching.targets is"),
    (Layers, "Layers.scenes is"), (AttentionView, "AttentionView.record is"), (Film, "Film.record is"),
    (lambda: Attention(query=[99, 0]), "Attention.query is"), (lambda: Attention(heads=3), "heads"),
    (lambda: TwoBoxes(target=[0.5, 0.5]), "target"), (lambda: TwoBoxes(colour="red"), "TwoBoxes has no"),
])
def test_a_figure_says_what_does_not_fit_when_it_is_made(make, complaint):
    with pytest.raises(Exception, match=complaint):
        make()


@pytest.mark.fault("diagnose(None / 'runs/x')")
@pytest.mark.parametrize(("wrong", "kind"), [(None, "NoneType"), ("runs/x", "str")])
def test_only_a_run_is_diagnosed(wrong, kind):
    with pytest.raises(ValueError, match=rf"^diagnose\(run\) is given {kind}: give what fit returns"):
        diagnose(wrong)


# --- figures of detections ----------------------------------------------------------------------------------------
COLUMNS = ("labels float / bool; scores 2-d or too few; ids too few; size None; area or crowd too short; lists")
ERRORS = "NaN scores; more targets than detections; label 9 of 2"


def found(**change: object) -> dict:
    """Detections of one image."""
    right = {"scores": torch.tensor([0.9, 0.4]), "labels": torch.tensor([0, 1]),
             "boxes": torch.tensor([[1.0, 1, 4, 4], [2, 2, 6, 6]])}
    return {**right, **change}


def truth(**change: object) -> dict:
    """The truth of one image."""
    right = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]]), "size": (8, 8)}
    return {**right, **change}


BAD_COLUMNS = [
    (truth(), found(labels=torch.tensor([0.0, 1.0]))), (truth(), found(labels=torch.tensor([True, False]))),
    (truth(), found(scores=torch.ones(2, 1))), (truth(), found(scores=torch.ones(1))), (truth(), found(scores=[1, 1])),
    (truth(), found(boxes=torch.ones(2, 3))), (truth(labels=torch.tensor([0.0])), found()),
    (truth(area=torch.ones(2)), found()), (truth(crowd=torch.zeros(0, dtype=torch.bool)), found()),
]


@pytest.mark.fault(COLUMNS)
@pytest.mark.parametrize(
    ("target", "detections"), [*BAD_COLUMNS, (truth(size=None), found()), (truth(size=(0, 8)), found())]
)
def test_columns_that_do_not_fit_are_refused_by_image_and_name(target, detections):
    with pytest.raises(ValueError, match=r"image 0: (target|detection) \w+ are|sizes"):
        coco_evaluate([target], [detections], ["a", "b"], [1, 2])


@pytest.mark.fault(COLUMNS)
@pytest.mark.parametrize(("names", "ids"), [(["a", "b"], [1]), (["a", "a"], [1, 2]), (["a", "b"], [1, 1])])
def test_a_table_of_classes_is_refused(names, ids):
    with pytest.raises(ValueError, match="give each class one name and one id"):
        coco_evaluate([truth()], [found()], names, ids)


@pytest.mark.parametrize("judge", [
    lambda targets, found: pr_curve(targets, found, 0), lambda targets, found: confusion_matrix(targets, found, 2),
    lambda targets, found: error_breakdown(targets, found),
], ids=["pr_curve", "confusion_matrix", "error_breakdown"])
@pytest.mark.fault(ERRORS)
def test_errors_are_not_counted_in_what_is_no_detection(judge):
    wrong = {
        "detections of image 0 are not finite": ([truth()], [found(scores=torch.tensor([NAN, 1]))]),
        "2 targets and 1 detections: give one of each": ([truth(), truth()], [found()]),
        "1 targets and 0 detections: give one of each": ([truth()], []),
        "targets are an empty list": ([], []),
    }
    for words, (targets, rows) in wrong.items():
        with pytest.raises(ValueError, match=f"^{words}"):
            judge(targets, rows)
    for target, row in BAD_COLUMNS:
        with pytest.raises(ValueError, match=r"^image 0: (target|detection) \w+ are .*: give tensors"):
            judge([target], [row])


@pytest.mark.fault(ERRORS)
def test_labels_and_shares_are_refused():
    nine = found(labels=torch.tensor([0, 9]))
    for wrong in (lambda: confusion_matrix([truth()], [nine], 2), lambda: pr_curve([truth()], [found()], 0, 7),
                  lambda: confusion_matrix([truth()], [found()], 2, min_score=2)):
        with pytest.raises(ValueError, match="labels go from 0 to 9|threshold is 7|min_score is 2"):
            wrong()


def test_a_kind_of_data_is_a_kind_of_data():
    assert DataConfig.read({"kind": "ShapesData"}) == ShapesData() == DataConfig.take("ShapesData")
