"""The command line, as a user types it: what is written, what is said where, and with which exit code."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official import DATA, official_weights
from PIL import Image
from pycocotools.coco import COCO
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from detr_nb.checks import read_image
from detr_nb.cli import (
    COMMANDS,
    Detections,
    Predict,
    coco_rows,
    command_parser,
    draw,
    find_pictures,
    main,
    predict,
    result_paths,
)
from detr_nb.config import HOMES, ModelConfig, find_kind, known_kinds
from detr_nb.data import Preprocess
from detr_nb.formats import write_coco
from detr_nb.model import DETR, detr_tiny
from detr_nb.pretrained import PUBLISHED, predict_image, pretrained_model
from detr_nb.shapes import DEFAULT, EASY, NAMES, Scenes
from detr_nb.terminal import read_options
from detr_nb.training import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = sorted((DATA / "bccd" / "JPEGImages").glob("*.jpg"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Away from the repository, as a user is."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def album() -> Path:
    """Three photographs, one of them in a subfolder, and a file that is cut off."""
    (Path("album") / "more").mkdir(parents=True)
    for path, folder in zip(PHOTOGRAPHS, ("album", "album", "album/more"), strict=True):
        shutil.copy(path, folder)
    Path("album/broken.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes()[:5000])
    return Path("album")


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A small checkpoint as the authors' program writes it."""
    file = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    torch.save({"model": official_weights("detr_r18_small")}, file)
    return file


@pytest.fixture(scope="module")
def quick(official, tmp_path_factory) -> Path:
    """The same as a saved model that looks at small pictures."""
    model, folder = pretrained_model(official), tmp_path_factory.mktemp("quick")
    model.preprocess = Preprocess(96, 160)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shapes() -> DETR:
    return detr_tiny(pretrained=True)


def scene(number: int) -> Image.Image:
    return to_pil_image(Scenes(DEFAULT, 40, seed=4)[number][0])


def rows_of(folder: str) -> list[dict]:
    return json.loads((Path(folder) / "detections.json").read_text("utf8"))


def written(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


# --- a run --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["quick", pytest.param("official", marks=pytest.mark.slow)])
def test_photographs_with_an_official_checkpoint(kind, album, capsys, request):
    weights = request.getfixturevalue(kind)
    code = main(["predict", "album", "--weights", str(weights), "--threshold", "0", "--out", "found"])
    said = capsys.readouterr()
    assert code == 1 and said.out == "3 of 4 pictures done, 60 boxes in found/detections.json\n"
    complaints = said.err.splitlines()
    assert len(complaints) == 1 and complaints[0].startswith("album/broken.jpg: picture is OSError")
    good = [path.relative_to("album").as_posix() for path in album.rglob("*.jpg") if path.name != "broken.jpg"]
    assert written("found") == sorted([*good, "detections.json"])
    model, rows = pretrained_model(weights), rows_of("found")
    for name in good:
        picture, result = read_image(album / name), read_image(Path("found") / name)
        assert picture.shape == result.shape and not torch.equal(picture, result)
        found = predict_image(model, picture, 0)
        ours = [row for row in rows if row["file_name"] == f"album/{name}"]
        assert [row["category_name"] for row in ours] == found["names"]
        assert [row["category_id"] for row in ours] == found["labels"].tolist()
        for row, score, (x0, y0, x1, y1) in zip(ours, found["scores"].tolist(), found["boxes"].tolist(), strict=True):
            assert row["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.011)
            assert row["score"] == pytest.approx(score, abs=1e-5)


def test_the_json_is_read_by_cocos_own_tools(album, quick):
    main(["predict", "album", "--weights", str(quick), "--threshold", "0"])
    rows = rows_of("predictions")
    truth = COCO()
    truth.dataset = {"images": [{"id": i} for i in {row["image_id"] for row in rows}],
                     "categories": [{"id": i} for i in range(91)], "annotations": []}
    truth.createIndex()
    assert len(truth.loadRes("predictions/detections.json").getAnnIds()) == len(rows) == 60
    files = {row["image_id"]: row["file_name"] for row in rows}
    assert len(set(files.values())) == len(files) == 3


def test_without_weights_the_model_of_the_package_looks(shapes, capsys):
    scene(30).save("scene.png")
    assert main(["predict", "scene.png"]) == 0
    found, rows = predict_image(shapes, Path("scene.png")), rows_of("predictions")
    assert [row["category_name"] for row in rows] == found["names"] and set(found["names"]) <= set(NAMES)
    assert rows and {row["file_name"] for row in rows} == {"scene.png"}
    assert capsys.readouterr().err == ""


def test_a_saved_model_keeps_its_ids_and_threshold():
    model = detr_tiny(pretrained=True)
    model.category_ids, model.threshold = [10, 20, 30, 40, 50, 60], 0.9
    model.save_pretrained("saved")
    scene(30).save("scene.png")
    assert main(["predict", "scene.png", "--weights", "saved"]) == 0
    rows = rows_of("predictions")
    assert rows and all(row["score"] >= 0.9 for row in rows)
    assert all(row["category_id"] == 10 * (NAMES.index(row["category_name"]) + 1) for row in rows)


def test_pictures_are_shown_upright_and_in_three_colours():
    sideways = scene(31).resize((200, 128))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save("turned.png", exif=exif)
    clear = scene(31).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 100))
    clear.save("clear.png")
    scene(31).convert("L").save("grey.webp", lossless=True)
    Image.fromarray(np.full((90, 120), 40_000, np.uint16)).save("deep.tif")
    assert main(["predict", "turned.png", "clear.png", "grey.webp", "deep.tif", "--threshold", "1"]) == 0
    assert written("predictions") == ["clear.png", "deep.tif.png", "detections.json", "grey.webp.png", "turned.png"]
    upright = pil_to_tensor(sideways.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(read_image("predictions/turned.png"), upright)
    with Image.open("predictions/turned.png") as picture:
        assert 0x0112 not in picture.getexif()
    assert torch.equal(read_image("predictions/clear.png"), pil_to_tensor(scene(31)))
    assert rows_of("predictions") == []


def test_a_second_run_gives_the_same_and_does_not_look_at_the_first(album):
    main(["predict", ".", "--threshold", "0", "--out", "found"])
    first, files = rows_of("found"), written("found")
    main(["predict", ".", "--threshold", "0", "--out", "found"])
    assert rows_of("found") == first and written("found") == files


# --- what goes wrong ----------------------------------------------------------------------------------------------
def test_one_of_each_exit_code(album, capsys):
    scene(30).save("scene.png")
    assert main(["predict", "scene.png"]) == 0
    assert main(["predict", "scene.png", "album/broken.jpg", "nowhere.jpg"]) == 1
    said = capsys.readouterr()
    assert "nowhere.jpg: picture is FileNotFoundError" in said.err and "1 of 3 pictures done" in said.out
    assert main(["predict", "album/broken.jpg", "nowhere.jpg"]) == 2
    assert "0 of 2 pictures done, predictions/detections.json is as it was" in capsys.readouterr().out
    assert {row["file_name"] for row in rows_of("predictions")} == {"scene.png"}


WRONG = {
    "no picture": (["empty"], "there is no picture in empty"),
    "nothing": ([], "there is no picture in nothing"),
    "no model": (["scene.png", "--weights", "nowhere.pth"], "there is no file or folder nowhere.pth"),
    "no weights in the folder": (["scene.png", "--weights", "empty"], "holds neither model.safetensors nor"),
    "half a model": (["scene.png", "--weights", "half.pth"], "half.pth is damaged, cut off or no checkpoint"),
    "its own folder": (["scene.png", "--out", "."], "would overwrite"),
    "its own folder, by a link": (["scene.png", "--out", "link"], "would overwrite"),
    "a file for a folder": (["scene.png", "--out", "half.pth"], "half.pth"),
    "a percentage": (["scene.png", "--threshold", "50"], "threshold is 50: it must be a number of at least 0 and"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_done_is_said_in_one_line_and_nothing_is_lost(kind, capsys, official):
    words, expected = WRONG[kind]
    Path("empty").mkdir()
    Path("link").symlink_to(".")
    scene(30).save("scene.png")
    Path("half.pth").write_bytes(official.read_bytes()[:100_000])
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert main(["predict", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("detr-nb: ") and expected in said.err
    assert "Traceback" not in said.err and said.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize("words, expected", [
    (["predict", "a.png", "--treshold", "0.5"], "did you mean --threshold"), (["find", "a.png"], "predict"),
    ([], "predict"), (["predict", "a.png", "--threshold", "high"], "threshold is 'high': it must be a number"),
    (["predict", "a.png", "--threshold"], "--threshold is wrong: expected one argument"),
])
def test_a_slip_of_the_pen_is_explained(words, expected, capsys):
    try:
        code = main(words)
    except SystemExit as left:
        code = left.code
    assert code == 2
    said = capsys.readouterr()
    assert expected in said.err


def test_a_picture_that_the_model_cannot_take_is_passed_over(capsys, quick):
    scene(30).save("scene.png")
    Image.new("RGB", (2000, 1)).save("thread.png")
    assert main(["predict", "thread.png", "scene.png", "--weights", str(quick)]) == 1
    assert capsys.readouterr().err.startswith("thread.png: ")


def test_the_help_tells_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        main(["predict", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert left.value.code == 0
    assert [field.name for field in fields(Predict)] == ["images", "weights", "out", "threshold", "overwrite"]
    for words in ("[images ...]", "--weights", "--out", "--threshold", "searched for pictures", "exit code is 0",
                  "the model's own if left out", "made if it is missing"):
        assert words in said
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "predict" in capsys.readouterr().out


# --- models -----------------------------------------------------------------------------------------------------------
def test_every_detector_is_listed_with_what_it_is(capsys):
    assert main(["models"]) == 0
    listed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    assert listed.keys() == known_kinds(ModelConfig).keys()
    assert all(words.endswith(".") for words in listed.values())


@pytest.mark.parametrize("name", [name for name, home in HOMES.items() if home.startswith("detr_nb.family.")])
def test_the_listed_options_are_the_defaults_and_can_be_typed(name, capsys):
    assert main(["models", name]) == 0
    flags = [word for line in capsys.readouterr().out.splitlines() for word in line.split(maxsplit=1) if "--" in line]
    words = ["--data", "ShapesData", "--model", name, *flags]
    config = read_options(TrainConfig, command_parser("train"), words)
    assert config.model == find_kind(name, ModelConfig)()


def test_names_of_published_weights_are_those_that_can_be_fetched():
    ours = [name for kind in known_kinds(ModelConfig).values() for name in vars(kind).get("WEIGHTS", ())]
    assert len(ours) > 8 and len(set(ours)) == len(ours)
    assert [name for name in ours if name not in PUBLISHED and not re.fullmatch(r"[\w-]+/[\w.-]+", name)] == []


def test_an_unknown_kind_is_one_line(capsys):
    assert main(["models", "VGG"]) == 2
    said = capsys.readouterr()
    assert not said.out and "DABDETR" in said.err and len(said.err.splitlines()) == 1


# --- train, eval, check-data --------------------------------------------------------------------------------------
@pytest.fixture
def drawn() -> list[str]:
    """Ten drawn pictures to learn from and six others, in COCO's format, and the flags that name them."""
    for name, count, seed in (("train", 10, 1), ("val", 6, 2)):
        write_coco(Scenes(replace(EASY, size=64), count, seed), Path("data") / name)
    flags = [word for role in ("train", "val") for word in (f"--data.{role}", f"data/{role}/images",
             f"--data.{role}_file", f"data/{role}/annotations.json")]
    sizes = ["--data.sizes.short_sides", "[64]", "--data.sizes.crop", "[]", "--data.sizes.eval_side", "64"]
    return ["--data", "CocoData", *flags, *sizes, "--data.workers", "0"]


FEW = ["--steps", "4", "--batch_size", "4", "--evaluations", "1", "--log_every", "1", "--progress", "false"]


@pytest.mark.slow
def test_a_run_from_the_command_line_is_trained_judged_and_used(drawn, capsys):
    """With the files that a user would have, and with the same options from the file that the run left."""
    assert main(["train", *drawn, "--model", "FineTuned", *FEW, "--folder", "mine"]) == 0
    assert "the model is in mine" in capsys.readouterr().out
    assert written("mine") == ["checkpoint.pt", "config.yaml", "log.jsonl"]
    assert main(["eval", "mine", "--out", "figures.json"]) == 0
    said, figures = capsys.readouterr().out, json.loads(Path("figures.json").read_text())
    last = json.loads(Path("mine/log.jsonl").read_text().splitlines()[-1])["metrics"]
    assert figures == last and all(f"{name} " in said for name in ("AP", "AR_100", *figures["per_class"]))
    assert main(["predict", "data/val/images", "--weights", "mine"]) == 0
    assert "6 of 6 pictures done" in capsys.readouterr().out
    assert main(["train", "--config", "mine/config.yaml"]) == 0  # is over, and stays as it was
    assert main(["train", "--config", "mine/config.yaml", "--lr", "1"]) == 2
    assert "lr: there 0.0015, here 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_a_folder_gets_one(drawn):
    assert main(["train", *drawn, "--model", "FineTuned", *FEW, "--steps", "1"]) == 0
    assert written("runs/detr") == ["checkpoint.pt", "config.yaml", "log.jsonl"]


def test_data_are_checked_before_anybody_trains(drawn, capsys):
    assert main(["check-data", *drawn]) == 0
    assert capsys.readouterr().out.count("no problems found") == 2
    file = Path("data/train/annotations.json")
    content = json.loads(file.read_text())
    content["annotations"][1]["bbox"] = [1, 2, 0, 3]
    content["annotations"][2]["category_id"] = 99
    file.write_text(json.dumps(content))
    assert main(["check-data", *drawn]) == 1
    said = capsys.readouterr().out
    assert "to learn from: 10 images, 3 classes, 2 problems: " in said and "annotations[2]" in said
    assert main(["train", *drawn, *FEW]) == 2
    *summary, last = capsys.readouterr().err.splitlines()
    assert last.startswith("detr-nb: data/train/annotations.json: annotations[2]") and len(summary) <= 3


def test_eval_says_what_it_needs(capsys):
    assert main(["eval"]) == 2 and "both --data and --weights" in capsys.readouterr().err
    assert main(["eval", "nowhere"]) == 2 and "nowhere holds no config.yaml" in capsys.readouterr().err


# --- the parts ----------------------------------------------------------------------------------------------------
def test_every_command_is_a_frozen_dataclass_and_a_function():
    for kind, function in COMMANDS.values():
        assert kind.__dataclass_params__.frozen and kind.__doc__ and callable(function)
    assert predict is COMMANDS["predict"][1]


def test_pictures_are_found_once_and_in_order(album):
    Path("album/notes.txt").write_text("no picture")
    Path("album/UPPER.JPG").write_bytes(b"")
    places = [Path("album/more"), Path("album"), Path("album/../album/notes.txt"), album]
    found, left_out = find_pictures(places, Path("out"))
    names = [path.name for path in found]
    assert names[0] == PHOTOGRAPHS[2].name and names[1:-1] == sorted(names[1:-1]) and names[-1] == "notes.txt"
    assert "UPPER.JPG" in names and len(names) == len(set(names)) == 6
    assert left_out[".txt"] >= 1 and set(left_out) == {".txt"}


folders = st.lists(st.sampled_from("abc"), max_size=3).map("/".join)
files = st.lists(st.tuples(folders, st.sampled_from(["1.jpg", "1.png", "1.bmp", "2.JPG", "x.y.gif", "n"])), min_size=1,
                 max_size=6, unique=True)


@given(files)
def test_every_picture_has_its_own_result_below_the_folder(names):
    pictures = [Path("in") / folder / name for folder, name in names]
    results = result_paths(pictures, Path("out/deep"))
    assert len(set(results)) == len(pictures) == len(results)
    for picture, result in zip(pictures, results, strict=True):
        assert result.is_relative_to("out/deep") and ".." not in result.parts
        assert result.suffix.lower() in (".jpg", ".jpeg", ".png") and result.name.startswith(picture.name)


def found_on(height: int, width: int) -> dict:
    boxes = torch.tensor([[0.2 * width, 0.2 * height, 0.6 * width, 0.7 * height], [-9, -9, width + 9.0, 0.5 * height]])
    return {"scores": torch.tensor([0.9, 0.6]), "labels": torch.tensor([2, 0]), "names": ["ü 2", "zero"],
            "boxes": boxes}


@pytest.mark.parametrize("size", [(40, 60), (480, 640), (1200, 900)])
def test_boxes_are_drawn_where_they_are(size):
    height, width = size
    picture = torch.full((3, height, width), 255, dtype=torch.uint8)
    drawn, found = draw(picture, found_on(height, width)), found_on(height, width)
    x0, y0, x1, y1 = map(int, found["boxes"][0].tolist())
    tone = drawn[:, y1, x1]
    assert (drawn[:, (y0 + y1) // 2, x0] == tone).all() and (drawn[:, y1, (x0 + x1) // 2] == tone).all()
    assert (tone < 255).any() and (drawn[:, y1 + (height - y1) // 2, width // 2] == 255).all()
    assert not (drawn[:, height // 2, 0] == tone).all(), "another class has another colour"
    assert (picture == 255).all(), "the picture itself is as it was"


def test_nothing_is_drawn_where_nothing_was_found():
    picture = torch.zeros(3, 20, 20, dtype=torch.uint8)
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "names": [],
               "boxes": torch.zeros(0, 4)}
    assert torch.equal(draw(picture, nothing), picture)


def test_rows_survive_json_with_letters_of_any_language(tmp_path):
    rows = coco_rows(found_on(100, 200), 7, Path("Käfer/1.jpg"), [5, 6, 9])
    assert rows[0] == {"image_id": 7, "file_name": "Käfer/1.jpg", "category_id": 9, "category_name": "ü 2",
                       "bbox": [40.0, 20.0, 80.0, 50.0], "score": 0.9}
    for some in ([rows, [], rows[:1]], [rows[:1]], [[]], []):
        growing = Detections(tmp_path)
        for part in some:
            growing.add(part)
        kept = growing.keep(whole=True).read_text("utf8")
        assert json.loads(kept) == [row for part in some for row in part]
        assert not rows_in(some) or "Käfer" in kept


def rows_in(parts: list[list[dict]]) -> int:
    return sum(map(len, parts))


# --- installed ----------------------------------------------------------------------------------------------------
def test_the_console_script_is_main():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]["scripts"]
    module, _, function = scripts["detr-nb"].partition(":")
    assert list(scripts) == ["detr-nb"] and getattr(importlib.import_module(module), function) is main


@pytest.mark.slow
def test_an_installed_copy_works_in_an_empty_folder(album, tmp_path):
    source, place = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "detr_nb", source / "detr_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(place), str(source)], check=True)
    command = [place / "bin" / "detr-nb", "predict", "album", "--out", "found"]
    environment = {"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("3 of 4 pictures done") and done.stderr.count("\n") == 1
    assert len(written("found")) == 4


def test_every_command_has_a_parser_whose_defaults_are_allowed():
    """`bench` was refused with its own defaults: its number of images was taken for a list of pictures."""
    for name in ("train", "bench"):
        kind = COMMANDS[name][0]
        assert read_options(kind, command_parser(name), []) == kind()
