"""What a stranger to the code found by trying: each is a kind that other tests know, in a place where it was missed."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_nb.checkpoints import read_checkpoint
from detr_nb.checks import DataError, check_data, picture_files
from detr_nb.cli import main
from detr_nb.config import ConfigError, text_config
from detr_nb.formats import CocoDataset, Sizes, VocDataset, YoloDataset
from detr_nb.loading import ShapesData
from detr_nb.shapes import EASY
from detr_nb.training import TrainConfig


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (90, 120, 30)).save(path)
    return path


def test_nothing_done_replaces_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(picture(tmp_path / "a.png")), "--out", str(out), "--threshold", "0"]) == 0
    before = (out / "detections.json").read_bytes()
    assert len(json.loads(before)) > 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "typo.png"), "--out", str(out)]) == 2
    assert (out / "detections.json").read_bytes() == before and "is as it was" in capsys.readouterr().out
    assert [file.name for file in out.iterdir() if "part" in file.name] == []


def test_a_link_to_itself_is_left_out(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    assert picture_files(tmp_path) == ([tmp_path / "a.png"], Counter({"broken link": 1}))


def test_weights_are_a_file_or_a_folder():
    with pytest.raises(ValueError, match="/dev/zero is no ordinary file"):
        read_checkpoint(Path("/dev/zero"))


@pytest.mark.parametrize("text", [
    '<annotation xmlns="http://x"><object>{}</object></annotation>',
    "<annotation><objects><object>{}</object></objects></annotation>",
    "<annotation><Object>{}</Object></annotation>",
], ids=["namespace", "wrapped", "capital"])
def test_objects_of_voc_are_found_however_they_are_wrapped(tmp_path, text):
    inside = "<name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    picture(tmp_path / "JPEGImages" / "a.png")
    for folder, name, words in (("Annotations", "a.xml", text.format(inside)), ("ImageSets/Main", "train.txt", "a\n")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text(words)
    dataset = VocDataset(tmp_path, "train")
    assert dataset.names == ["cat"] and len(dataset[0][1]["labels"]) == 1


def yolo(folder: Path, line: str, more: str = "") -> Path:
    picture(folder / "train" / "images" / "a.png")
    (folder / "train" / "labels").mkdir()
    (folder / "train" / "labels" / "a.txt").write_text(line)
    (folder / "data.yaml").write_text(f"names: [cat]\n{more}")
    return folder / "data.yaml"


def test_the_folder_above_images_will_do(tmp_path):
    names = yolo(tmp_path, "0 .5 .5 .2 .2")
    one, two = (YoloDataset(tmp_path / place, names) for place in ("train", "train/images"))
    torch.testing.assert_close(one[0][1]["boxes"], two[0][1]["boxes"])


def test_key_points_are_no_polygon(tmp_path):
    names = yolo(tmp_path, "0 .5 .5 .2 .2 .5 .5 1 .4 .4 1", "kpt_shape: [2, 3]\n")
    with pytest.raises(DataError, match="key points"):
        YoloDataset(tmp_path / "train", names)


def test_true_is_no_number_of_an_image(tmp_path):
    picture(tmp_path / "a.png")
    boxes = [{"id": 1, "image_id": True, "category_id": 1, "bbox": [1, 1, 9, 9]}]
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": boxes,
               "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = CocoDataset(tmp_path, tmp_path / "a.json")
    assert len(dataset[0][1]["labels"]) == 0 and [problem.kind for problem in dataset.orphans()] == ["orphan"]


def test_what_is_held_out_is_drawn_alone():
    data = ShapesData(EASY, train_images=10**6, val_images=3)
    assert torch.equal(data.held_out().images, ShapesData(EASY, 2, 3).load()[1].images)


def test_a_place_above_the_root_is_no_mistake_of_the_program(tmp_path, capsys):
    out = f"{tmp_path}/missing" + "/.." * 40 + os.path.relpath(tmp_path / "found", "/").join(("/", ""))
    assert main(["predict", str(picture(tmp_path / "a.png")), "--out", out]) == 0
    assert "mistake" not in capsys.readouterr().err


def coco(folder: Path, boxes: list, name: str = "ann.json") -> Path:
    picture(folder / "a.png")
    rows = [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": rows,
               "categories": [{"id": 1, "name": "cat"}]}
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.mark.parametrize(("boxes", "kinds"), [
    ([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5]], ["shares"]), ([[0.1, 0.2, 0.3, 0.4], [5, 5, 20, 20]], []),
    ([], ["empty"]),
])
def test_boxes_that_are_shares_of_the_picture_are_named(tmp_path, boxes, kinds):
    found = check_data(CocoDataset(tmp_path, coco(tmp_path, boxes)))
    assert [problem.kind for problem in found] == kinds


def test_polygons_alone_are_nothing_wrong(tmp_path, capsys):
    names = yolo(tmp_path, "0 .1 .1 .9 .1 .5 .9")
    places = [f"--data.{part}={tmp_path / 'train'}" for part in ("train", "val")]
    assert main(["check-data", "--data", "YoloData", *places, f"--data.names={names}"]) == 0
    assert "polygon" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"eval_side": 1}, {"longest": 10}, {"short_sides": (8,)}, {"crop": (1, 2)}])
def test_photographs_keep_some_pixels(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))}.* is .*: it must be a whole number of at least 16"):
        Sizes(**change)


def test_a_file_of_many_names_ends_at_the_first_that_is_unknown():
    with pytest.raises(ConfigError, match="name0 is unknown"):
        text_config(TrainConfig, "".join(f"name{i}: 1\n" for i in range(20_000)))
