"""One description, four ways in: Python, JSON, YAML and flags say the same, refuse the same, and in the same words."""

import json
import subprocess
import sys
import warnings
from abc import abstractmethod
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from stored import STORED
from torch import nn

import detr_nb.model
from detr_nb.backbone import ResNet, TinyBackbone
from detr_nb.config import (
    HOMES,
    KINDS,
    Config,
    ConfigError,
    ModelConfig,
    Width,
    complete,
    config_text,
    known_kinds,
    text_config,
)
from detr_nb.finetuning import resize_queries
from detr_nb.formats import CocoData, Sizes
from detr_nb.hub import describe, read_description
from detr_nb.insight import WeightSnapshots
from detr_nb.loading import DataConfig, ShapesData
from detr_nb.model import (
    BackboneConfig,
    DETRConfig,
    HandMade,
    ResNetConfig,
    ResNetModel,
    TinyConfig,
    TinyModel,
    detr,
    detr_tiny,
)
from detr_nb.shapes import EASY, HARD
from detr_nb.terminal import parse_config
from detr_nb.training import TrainConfig, read_config

SMALL = {"num_queries": 4, "hidden_dim": 16, "nheads": 2, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 16}


class Tool(Config):
    """A base for the kinds of this file."""

    @abstractmethod
    def use(self) -> str:
        """Say what it does."""


@dataclass(frozen=True)
class Hammer(Tool):
    """A user's class: a plain frozen dataclass."""

    weights: tuple[Width, ...] = (3,)
    place: Path | None = None

    def use(self) -> str:
        """Hit."""
        return "hit"


@dataclass(frozen=True)
class Saw(Tool, former=("OldSaw",)):
    """Another."""

    teeth: Width

    def use(self) -> str:
        """Cut."""
        return "cut"


@dataclass(frozen=True)
class Box(Config):
    """Tools."""

    first: Tool = Hammer()
    all: tuple[Tool, ...] = ()
    last: Saw | None = None


CONFIGS = [
    Hammer((1, 2), Path("a/b")), Box(Saw(3), (Hammer(), Saw(4)), Saw(5)), TinyConfig((8, 16), (4, 16), True),
    ResNetConfig("resnet101", dilation=True, pretrained=False), DETRConfig(TinyConfig(), pre_norm=True, dropout=0.3),
    TinyModel(widths=(8, 8, 8)), ResNetModel(dilation=True), ShapesData(HARD, 12, 3),
    TrainConfig(CocoData(Path("a"), Path("b"), Path("c"), Path("d"), sizes=Sizes((64,), crop=())), DETRConfig(),
                minutes=2.5, scales=((0.5, 0.5),), drops=(0.6, 0.9)),
]
names = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)


@names
def test_a_configuration_comes_back_from_json(config):
    text = json.dumps(config.plain())
    assert type(config).read(json.loads(text)) == config
    assert Config.read(json.loads(text)) == config, "its kind is enough"


@names
def test_a_configuration_comes_back_from_yaml(config):
    assert text_config(type(config), config_text(config)) == config


@pytest.mark.parametrize("config", [one for one in CONFIGS if not isinstance(one, Hammer | Box)],
                         ids=lambda config: type(config).__name__)
def test_a_configuration_comes_back_through_the_command_line(config, tmp_path):
    (tmp_path / "a.yaml").write_text(config_text(config))
    assert parse_config(type(config), ["--config", str(tmp_path / "a.yaml")]) == config


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 0.1\nsteps: 7\n")
    flags = ["--lr", "1e-3", "--model", "DETRConfig", "--model.backbone", "TinyConfig", "--model.nheads", "4"]
    found = read_config(["--config", str(tmp_path / "a.yaml"), *flags])
    assert found == TrainConfig(model=DETRConfig(TinyConfig(), nheads=4), lr=1e-3, steps=7)
    for words in (["--model", "TinyModel"], []):
        assert read_config([*words, "--model.num_queries", "30"]).model == TinyModel(num_queries=30)


def test_another_class_takes_nothing_from_the_default():
    assert read_config(["--model", "ResNetModel"]).model == ResNetModel()
    assert read_config(["--data", "ShapesData", "--data.scenes.size", "64"]).data == ShapesData(replace(EASY, size=64))
    assert ShapesData.read({"scenes": {"size": 64}}) == ShapesData(replace(EASY, size=64))


# --- kinds --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", HOMES)
def test_every_kind_is_at_home_where_it_is_said_to_be(name):
    kind = getattr(import_module(HOMES[name]), name)
    assert KINDS[name] is kind and kind.__module__ == HOMES[name] and issubclass(kind, Config) and kind.__doc__


INSIDE = {"HandMade", "WeightSnapshots"}  # hold an object of Python's, for which a file has no words
BROKEN = "detr_nb.failures"  # configurations that are wrong on purpose, offered to nobody


@pytest.mark.parametrize("base", [BackboneConfig, DataConfig, ModelConfig])
def test_every_kind_of_the_library_has_a_home(base):
    offered = known_kinds(base)
    ours = {name for name, kind in KINDS.items() if issubclass(kind, base) and complete(kind)
            and name == kind.__name__ and kind.__module__.startswith("detr_nb.") and kind.__module__ != BROKEN}
    assert ours - INSIDE == {name for name in HOMES if issubclass(KINDS[name], base)}
    assert offered.keys() & ours == ours - INSIDE and not any(kind.__module__ == BROKEN for kind in offered.values())


def test_a_kind_is_imported_when_it_is_asked_for_and_nothing_else_is(tmp_path):
    code = ("import sys\nfrom detr_nb.config import ModelConfig, ConfigError\n"
            "assert 'detr_nb.model' not in sys.modules\n"
            "ModelConfig.read({'kind': 'TinyModel'})\n"
            "assert 'detr_nb.model' in sys.modules and 'detr_nb.training' not in sys.modules\n"
            "try:\n    ModelConfig.read({'kind': 'evil.Model'})\n"
            "except ConfigError as error:\n    print(str(error)[:20], 'evil' in sys.modules)\n")
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "kind is 'evil.Model' False\n", done.stderr


def test_old_names_and_places_are_understood():
    assert Tool.read({"kind": "OldSaw", "teeth": 3}) == Saw(3) and Saw(3).plain()["kind"].endswith("Saw")
    assert BackboneConfig.read({"kind": "TinyBackbone", "widths": [8], "strides": [4]}) == TinyConfig((8,), (4,))
    old = {"class_path": "detr_nb.training.TinyModel", "init_args": {"num_queries": 5}}
    text = json.dumps({"model": old, "data": {"class_path": "detr_nb.training.ShapesData"}})
    with pytest.warns(FutureWarning) as said:
        assert text_config(TrainConfig, text).model == TinyModel(num_queries=5)
    assert {str(warning.message) for warning in said} == {
        "detr_nb.training.TinyModel has moved to detr_nb.model: write TinyModel",
        "detr_nb.training.ShapesData has moved to detr_nb.loading: write ShapesData",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_config(TrainConfig, json.dumps({"data": {"class_path": "detr_nb.loading.ShapesData"}}))


# --- what is refused ----------------------------------------------------------------------------------------------
BAD = {  # dotted field of a run: a value, and words of the complaint
    "steps": (0, "is 0: it must be a whole number of at least 1"),
    "batch_size": (2.5, "is 2.5: it must be a whole number"), "lr": (-1, "is -1: it must be a number above 0"),
    "ema": (1, "is 1: it must be a number of at least 0 and below 1"), "minutes": (10**7, "and at most 527040"),
    "bf16": ("perhaps", "is 'perhaps': it must be true or false"), "clip": (0, "is 0: it must be a number above 0"),
    "drops": ([0.5, 2], "[1] is 2: it must be a number of at least 0 and at most 1"),
    "scales": ([[0.5, 0]], "[0][1] is 0: it must be a number of at least 0.05 and at most 1"),
    "data.train_images": (True, "is True: it must be a whole number"),
    "data.scenes.size": ("64", "is '64': it must be a whole number of at least 8 and at most 8192"),
    "model.widths": ([8, 0, 8], "[1] is 0"), "model.num_queries": (10**6, "at most 10000"),
    "model.enc_layers": (101, "at most 100"), "model.dropout": (float("nan"), "is nan"),
    "model.temperature": (0, "above 0"), "model.hidden_dim": (None, "is None"),
}


def nested(field: str, value: object) -> dict:
    """Plain words of a run with one wrong value."""
    words = {"model": {"kind": "TinyModel"}, "data": {"kind": "ShapesData", "scenes": {}}}
    *path, last = field.split(".")
    place = words
    for part in path:
        place = place[part]
    place[last] = value
    return words


@pytest.mark.parametrize("field", BAD)
def test_a_wrong_value_is_named_with_its_address_and_what_is_allowed(field):
    value, words = BAD[field]
    with pytest.raises(ConfigError) as caught:
        TrainConfig.read(nested(field, value))
    assert str(caught.value).startswith(field) and words in str(caught.value), str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("field", BAD)
def test_flags_and_files_refuse_it_in_the_same_words(field, tmp_path):
    value, words = BAD[field]
    flags = ["--data", "ShapesData", "--model", "TinyModel", f"--{field}", json.dumps(value).replace("NaN", ".nan")]
    with pytest.raises(ConfigError) as caught:
        read_config(flags)
    assert str(caught.value).startswith(field) and words in str(caught.value), str(caught.value)


@pytest.mark.parametrize(("kind", "values", "words"), [
    (TrainConfig, {"steps": 0}, "steps is 0"), (TinyModel, {"num_queries": 0}, "num_queries is 0"),
    (ShapesData, {"val_images": 0}, "val_images is 0"), (Sizes, {"longest": 0}, "longest is 0"),
    (Hammer, {"weights": (1, 0)}, "weights[1] is 0"), (DETRConfig, {"dropout": 1}, "dropout is 1"),
])
def test_python_refuses_it_too(kind, values, words):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert str(caught.value).startswith(words)
    with pytest.raises(ConfigError):
        replace(kind(), **values)


@pytest.mark.parametrize(("words", "complaint"), [
    ({"stps": 3}, "stps is unknown: TrainConfig has data, model, steps"),
    ({"model": {"kind": "TinyModel", "queries": 3}}, "model.queries is unknown: TinyModel has num_queries"),
    ({"model": {"kind": "VGG"}}, "model.kind is 'VGG': it must be one of AnchorDETR, "),
    ({"model": {"num_queries": 3}}, "model.kind is missing: it must be one of"),
    ({"model": {"kind": "ShapesData"}}, "model.kind is 'ShapesData': it must be one of"),
    ({"model": None}, "model is None: it must be a ModelConfig, or a dictionary"),
    ({"data": {"kind": "CocoData", "train": "a"}}, "data.train_file is missing: CocoData has no default"),
    ({"model": {"kind": "DETRConfig", "backbone": {"kind": "TinyConfig", "strides": [0]}}},
     "model.backbone.strides[0] is 0"),
])
def test_words_that_fit_nothing_are_refused(words, complaint):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.read(words)
    assert str(caught.value).startswith(complaint), str(caught.value)


def test_what_has_no_words_is_named():
    with pytest.raises(ConfigError, match="module is Conv2d, for which a file has no words"):
        HandMade(nn.Conv2d(3, 8, 1)).plain()


# --- models -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [
    DETRConfig(TinyConfig((8, 16), (4, 8)), **SMALL), DETRConfig(ResNetConfig("resnet18", pretrained=False), **SMALL),
], ids=["tiny", "resnet18"])
def test_a_model_knows_what_built_it(config):
    model = config.build(3)
    assert model.config == config and model.num_classes == 3
    words = json.loads(json.dumps(describe(model)))
    assert read_description(words) == config and words["num_classes"] == 3


def test_a_backbone_that_is_there_is_described_if_it_is_known():
    for module, config in ((TinyBackbone((8, 16), (4, 8)), TinyConfig((8, 16), (4, 8))),
                           (ResNet("resnet18", pretrained=False), ResNetConfig("resnet18", pretrained=False))):
        model = detr(module, 3, **SMALL)
        assert model.config.backbone == config and model.memory.backbone is module


def test_nothing_is_fetched_for_a_description(monkeypatch):
    monkeypatch.setattr(detr_nb.model.ResNet, "__init__", refuse_pretrained(ResNet.__init__))
    words = {**DETRConfig(ResNetConfig("resnet18", pretrained=True), **SMALL).plain(), "num_classes": 3}
    config = read_description(words)
    assert config.backbone == ResNetConfig("resnet18", pretrained=False)
    config.build(3)


def refuse_pretrained(build):
    def refusing(self, name="resnet50", dilation=False, pretrained=True, **rest):
        assert not pretrained, "weights would be fetched"
        build(self, name, dilation, pretrained, **rest)

    return refusing


def test_the_queries_are_drawn_last_and_the_decoder_may_share_them():
    @dataclass(frozen=True)
    class Sharing(DETRConfig):
        def decoder(self, columns, memory, queries):
            decoder = super().decoder(columns, memory, queries)
            decoder.shared = queries.embedding
            return decoder

    torch.manual_seed(0)
    plain = DETRConfig(TinyConfig(), **SMALL).build(3)
    torch.manual_seed(0)
    shared = Sharing(TinyConfig(), **SMALL).build(3)
    assert shared.decoder.shared is shared.queries.embedding
    for name, value in plain.state_dict().items():
        assert torch.equal(value, shared.state_dict()[name]), name


def test_what_weights_depend_on_leaves_out_what_they_do_not():
    base = DETRConfig(TinyConfig())
    assert base.bound() == replace(base, dropout=0.5, aux_loss=False).bound()
    for changed in ({"nheads": 4}, {"pre_norm": True}, {"backbone": TinyConfig(strides=(4, 8, 8))}):
        assert replace(base, **changed).bound() != base.bound()


def test_a_filmed_model_is_a_configuration_like_others():
    camera = WeightSnapshots(TinyModel(num_queries=3), every=5)
    assert camera == WeightSnapshots(TinyModel(num_queries=3), every=5) and camera.film == {}
    assert Config.read(json.loads(json.dumps(camera.plain()))) == camera
    assert camera.build(2).config == TinyModel(num_queries=3).build(2).config


# --- old files ----------------------------------------------------------------------------------------------------
def test_an_old_folder_is_read_as_what_it_was():
    words = json.loads((STORED / "model" / "config.json").read_text())
    assert "kind" not in words
    small = {"num_queries": 4, "hidden_dim": 16, "nheads": 2, "dec_layers": 2, "dim_feedforward": 16}
    assert read_description(words) == detr_tiny(num_classes=3, widths=(16, 16, 16), dropout=0.1, **small).config


def test_an_old_run_is_read_as_what_it_was():
    state = torch.load(STORED / "run" / "checkpoint.pt", weights_only=True)
    text = (STORED / "run" / "config.yaml").read_text()
    with pytest.warns(FutureWarning, match="has moved"):
        config = text_config(TrainConfig, text)
    with pytest.warns(FutureWarning, match="has moved"):
        assert text_config(TrainConfig, state["config"]) == config
    assert isinstance(config.model, TinyModel) and config.data.scenes.size == 64 and config.ema == 0.9
    assert read_description(state["description"]) == config.model.build(3).config


def test_the_recipe_of_the_paper_is_read():
    recipe = Path(__file__).parents[1] / "results" / "paper_coco.yaml"
    config = read_config(["--config", str(recipe)])
    assert config.model == ResNetModel() and config.epochs == 300 and config.data.train == Path("coco/train2017")


def test_a_description_must_hold_every_field_however_deep():
    words = describe(detr_nb.model.detr_tiny())
    assert read_description(words) == detr_nb.model.detr_tiny().config
    for name in ("strides", "coordinates"):
        backbone = {key: value for key, value in words["backbone"].items() if key != name}
        with pytest.raises(ConfigError, match=rf"backbone\.{name} is missing"):
            read_description({**words, "backbone": backbone})


@pytest.mark.parametrize(("text", "complaint"), [
    ("model:\n  class_path: TinyModel\n  num_queries: 5", "num_queries is unknown beside class_path"),
    ("", "the text is None"), ("- 1", "the text is .* it must be lines of names and values"), ("steps: [", "no YAML"),
], ids=["beside class_path", "empty", "a list", "no yaml"])
def test_a_text_that_is_no_configuration_is_refused_in_words(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        text_config(TrainConfig, text)


@pytest.mark.parametrize("layers", [0, 101])
def test_a_decoder_has_at_least_one_layer(layers):
    with pytest.raises(ConfigError, match="dec_layers is .* at least 1 and at most 100"):
        DETRConfig(dec_layers=layers)
    with pytest.raises(ConfigError, match="widths is .*: it must have at least 1 entries"):
        TinyConfig((), ())


def test_a_number_of_queries_that_is_not_allowed_leaves_the_model_as_it_was():
    model = detr_nb.model.detr_tiny()
    with pytest.raises(ConfigError, match="resize_queries.n is 200000"):
        resize_queries(model, 200000)
    assert model.queries.count == model.config.num_queries == 16


@pytest.mark.parametrize("threshold", [None, "high"])
def test_a_threshold_that_is_no_number_is_refused_before_anything_is_written(threshold, tmp_path):
    model = detr_nb.model.detr_tiny()
    model.threshold = threshold
    with pytest.raises(ValueError, match="threshold is .* a number from 0 to 1"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.safetensors"))
