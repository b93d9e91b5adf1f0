"""Real data: readers against pycocotools and Pillow, transforms against painted boxes and the paper, loaders."""

import inspect
import json
import math
import os
import pickle
import random
import shutil
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy.stats import ks_2samp
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from detr_nb.boxes import cxcywh_to_xyxy, scale_boxes, xyxy_to_cxcywh, xyxy_to_xywh
from detr_nb.checks import (
    KINDS,
    DataError,
    Problem,
    check_data,
    picture_size,
    read_image,
    summary,
)
from detr_nb.data import (
    Batch,
    Preprocess,
    RandomSizeCrop,
    apply_transform,
    collate,
    denormalise,
    eval_transform,
    fitted_size,
    normalise,
    pad_images,
    train_transform,
)
from detr_nb.formats import CocoDataset, VocDataset, YoloDataset
from detr_nb.loading import (
    Augmented,
    MemoryDataset,
    MemoryLoader,
    Transformed,
    epoch_loader,
    epoch_order,
    flip_transpose,
    in_memory,
)

BCCD = Path(__file__).parent / "data" / "bccd"


def whole_set(name):
    """A folder of the data given from outside, or a skip that says what is missing."""
    folder = Path(os.environ.get("DETR_NB_DATA", "")) / name
    if not os.environ.get("DETR_NB_DATA") or not folder.is_dir():
        pytest.skip(f"DETR_NB_DATA names no folder with {name}/")
    return folder


def painted(size, corners):
    """A black picture with boxes of different greys, and a target whose labels are the places of the greys."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for i, (x0, y0, x1, y1) in enumerate(corners):
        image[:, y0:y1, x0:x1] = 40 + 30 * i
    boxes = xyxy_to_cxcywh(scale_boxes(torch.tensor(corners).float().reshape(-1, 4), 1 / size[0], 1 / size[1]))
    return image, {"labels": torch.arange(len(corners)), "boxes": boxes, "image_id": 3, "size": size}


def corners_in_pixels(image, target):
    return scale_boxes(cxcywh_to_xyxy(target["boxes"]), *image.shape[1:])


def corners_of_grey(image, place, spread=0):
    """Corners of the pixels with the grey of one place; None if there are none."""
    rows, cols = ((image[0].int() - (40 + 30 * place)).abs() <= spread).nonzero().T
    return torch.tensor([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]).float() if len(rows) else None


# reading pictures


def turned_by_hand(pixels, note):
    """What each of the eight EXIF notes means, from the standard's table (where row 0 and column 0 belong)."""
    return {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels),
    }[note]  # fmt: skip


@pytest.mark.parametrize("note", range(1, 9))
def test_exif_notes_are_obeyed(tmp_path, note):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = note
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = torch.from_numpy(turned_by_hand(pixels, note).copy()).permute(2, 0, 1)
    torch.testing.assert_close(read_image(tmp_path / "a.png"), expected)
    assert picture_size(tmp_path / "a.png") == tuple(expected.shape[1:])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_becomes_three_colours(tmp_path, mode):
    grey = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    if mode.startswith("I"):
        wide = grey.astype(np.uint16) * 257
        picture = Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32))
    else:
        picture = Image.fromarray(grey).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I") else "a.png")
    picture.save(path)
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.is_contiguous()
    torch.testing.assert_close(image, torch.from_numpy(grey).expand(3, 2, 3), atol=2, rtol=0)


def test_a_picture_of_one_pixel_can_be_written_to(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    image += 1
    assert image.flatten().tolist() == [2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff\xe0 rubbish"])
def test_unreadable_pictures_are_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.jpg: picture is .*restore the file"):
        read_image(tmp_path / "bad.jpg")
    for read in (read_image, picture_size):
        with pytest.raises(DataError, match=r"absent\.jpg"):
            read(tmp_path / "absent.jpg")


# readers


def coco_folder(path, annotations, categories=((1, "a"), (5, "b"), (90, "c")), images=({"id": 1},)):
    """A COCO folder with blank pictures of 40 rows and 60 columns."""
    rows = [{"file_name": f"{image['id']}.png", "height": 40, "width": 60, **image} for image in images]
    for row in rows:
        Image.new("RGB", (60, 40), "grey").save(path / row["file_name"])
    content = {
        "images": rows, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in categories]
    }  # fmt: skip
    (path / "a.json").write_text(json.dumps(content))
    return CocoDataset(path, path / "a.json", masks=True)


def test_masks_equal_pycocotools_in_all_three_notations(tmp_path, capsys):
    runs = coco_mask.encode(np.asfortranarray(np.eye(40, 60, dtype=np.uint8)))
    packed = {"size": [40, 60], "counts": runs["counts"].decode()}
    polygons = [[3, 3, 20, 4, 18, 30], [40, 10, 50, 10, 50, 20, 40, 20]]
    outlines = [polygons, packed, {"size": [40, 60], "counts": [100, 40, 2260]}]
    rows = [
        {"id": i, "image_id": 1, "category_id": 5, "bbox": [0, 0, 60, 40], "area": 1, "iscrowd": int(i > 1),
         "segmentation": outline} for i, outline in enumerate(outlines, 1)
    ]  # fmt: skip
    target = coco_folder(tmp_path, rows)[0][1]
    reference = COCO(tmp_path / "a.json")
    for mask, row in zip(target["masks"], rows, strict=True):
        np.testing.assert_array_equal(mask.numpy(), reference.annToMask(row).astype(bool))


def test_coco_ids_are_contiguous_and_reversible(tmp_path):
    rows = [{"id": i, "image_id": 1, "category_id": c, "bbox": [1, 1, 5, 5 + i]} for i, c in enumerate((90, 1, 5, 90))]
    dataset = coco_folder(tmp_path, rows, categories=((90, "c"), (1, "a"), (5, "b")))
    labels = dataset[0][1]["labels"].tolist()
    assert labels == [2, 0, 1, 2] and dataset.names == ["a", "b", "c"]
    assert [dataset.category_ids[label] for label in labels] == [90, 1, 5, 90]


def test_coco_details(tmp_path):
    rows = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [-10, 5, 20, 10]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 10]},
        {"id": 3, "image_id": 1, "category_id": 5, "bbox": [0, 0, 60, 40], "iscrowd": 1},
    ]
    dataset = coco_folder(tmp_path, rows, images=({"id": 1}, {"id": 2}))
    target = dataset[0][1]
    assert target["crowd"].tolist() == [False, True] and target["area"].tolist() == [200, 2400]
    torch.testing.assert_close(target["boxes"][0], torch.tensor([5 / 60, 10 / 40, 10 / 60, 10 / 40]))
    empty = dataset[1][1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 40, 60)
    assert empty["labels"].dtype == torch.int64
    assert len(CocoDataset(tmp_path, tmp_path / "a.json", keep_crowd=False)[0][1]["labels"]) == 1
    assert len(CocoDataset(tmp_path, tmp_path / "a.json", drop_degenerate=False)[0][1]["labels"]) == 3
    torch.testing.assert_close(dataset[-1][0], dataset[1][0])
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"category_id": 4, "bbox": [0, 0, 5, 5]}, r"annotations\[0\] \(id 1\) class is 4 .*use one of 1, 5, 90"),
        ({"category_id": 1, "bbox": [0, 0, float("nan"), 5]}, r"annotations\[0\] \(id 1\) box is .*nan.*finite"),
        ({"category_id": 1, "bbox": [0, 0, 5]}, r"annotations\[0\] \(id 1\) box is \[0, 0, 5\] \(non-finite\)"),
        ({"category_id": 1}, r"annotations\[0\] \(id 1\) box is None"),
        ({"bbox": [0, 0, 5, 5]}, r"annotations\[0\] \(id 1\) class is None"),
    ],
)
def test_what_cannot_be_mended_is_refused_by_name(tmp_path, row, words):
    dataset = coco_folder(tmp_path, [{"id": 1, "image_id": 1, **row}])
    with pytest.raises(DataError, match=r"a\.json: " + words):
        dataset[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"images": []}'])
def test_files_that_are_no_coco(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json: content is"):
        CocoDataset(tmp_path, tmp_path / "a.json")


def voc_folder(path, objects, split="train", stem="one"):
    """A VOC folder with one blank picture of 40 rows and 60 columns."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (path / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), "grey").save(path / "JPEGImages" / f"{stem}.jpg")
    sides = ("xmin", "ymin", "xmax", "ymax")
    rows = "".join(
        f"<object><name>{name}</name><bndbox>" + "".join(f"<{s}>{v}</{s}>" for s, v in zip(sides, box, strict=True))
        + "</bndbox></object>" for name, box in objects
    )  # fmt: skip
    size = "<size><width>60</width><height>40</height></size>"
    (path / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{rows}</annotation>")
    with open(path / "ImageSets" / "Main" / f"{split}.txt", "a") as file:
        file.write(f"{stem} 1\n\n")


def test_voc_splits_share_one_class_table(tmp_path):
    voc_folder(tmp_path, [("zebra", (1, 1, 9, 9))], "train", "one")
    voc_folder(tmp_path, [("ant", (1, 1, 9, 9))], "val", "two")
    train, val = VocDataset(tmp_path, "train"), VocDataset(tmp_path, "val")
    assert train.names == val.names == ["ant", "zebra"] and len(train) == len(val) == 1
    assert train[0][1]["labels"].tolist() == [1] and val[0][1]["labels"].tolist() == [0]


def test_voc_details(tmp_path):
    voc_folder(tmp_path, [("ant", (1, 1, 9, 9)), ("ant", (5, 5, 5, 5))])
    image, target = VocDataset(tmp_path, "train", first_pixel=1)[0]  # from pixel 5 to pixel 5 is one pixel wide
    torch.testing.assert_close(corners_in_pixels(image, target), torch.tensor([[0.0, 0, 9, 9], [4, 4, 5, 5]]))
    assert len(VocDataset(tmp_path, "train")[0][1]["labels"]) == 1
    assert len(VocDataset(tmp_path, "train", drop_degenerate=False)[0][1]["labels"]) == 2
    with pytest.raises(DataError, match=r"one\.xml: object\[0\] class is 'ant' .*use one of 'bee'"):
        VocDataset(tmp_path, "train", names=["bee"])[0]
    (tmp_path / "Annotations" / "one.xml").write_text("<annotation><object>")
    with pytest.raises(DataError, match=r"one\.xml: content is"):
        VocDataset(tmp_path, "train", names=["ant"])[0]


def test_bccd_boxes_equal_a_plain_reading_of_the_files():
    dataset = VocDataset(BCCD, "trainval", drop_degenerate=False)
    assert dataset.names == ["Platelets", "RBC", "WBC"]
    for (_, stem), (image, target) in zip(dataset.items, map(dataset.__getitem__, range(3)), strict=True):
        root = ET.parse(BCCD / "Annotations" / f"{stem}.xml").getroot()
        written = [[float(side.text) for side in box] for box in root.iter("bndbox")]
        torch.testing.assert_close(corners_in_pixels(image, target), torch.tensor(written), atol=1e-3, rtol=0)
        assert [dataset.names[i] for i in target["labels"]] == [name.text for name in root.iter("name")]


def yolo_folder(path, texts, names="names: [ant, bee]\n", size=(60, 40)):
    """A YOLO folder with blank pictures of 40 rows and 60 columns; a text of None writes no file."""
    for part in ("images", "labels"):
        (path / part).mkdir(parents=True, exist_ok=True)
    for stem, text in texts.items():
        Image.new("RGB", size, "grey").save(path / "images" / f"{stem}.png")
        if text is not None:
            (path / "labels" / f"{stem}.txt").write_text(text)
    (path / "data.yaml").write_text(names)
    return YoloDataset(path / "images", path / "data.yaml")


def test_yolo_equals_voc_on_the_same_photographs(tmp_path):
    """The text files are written from the XML with plain arithmetic; the bad box goes along."""
    voc = VocDataset(BCCD, "trainval")
    for part in ("train/images", "train/labels"):  # the other usual layout
        (tmp_path / part).mkdir(parents=True)
    for _, stem in voc.items:
        shutil.copy(BCCD / "JPEGImages" / f"{stem}.jpg", tmp_path / "train" / "images")
        lines = []
        for thing in ET.parse(BCCD / "Annotations" / f"{stem}.xml").getroot().iter("object"):
            x0, y0, x1, y1 = (float(side.text) for side in thing.find("bndbox"))
            shares = ((x0 + x1) / 2 / 640, (y0 + y1) / 2 / 480, (x1 - x0) / 640, (y1 - y0) / 480)
            lines.append(" ".join(map(str, (voc.names.index(thing.findtext("name")), *shares))))
        (tmp_path / "train" / "labels" / f"{stem}.txt").write_text("\n".join(lines))
    yolo = YoloDataset(tmp_path / "train" / "images", voc.names)
    assert (yolo.names, yolo.category_ids, len(yolo)) == (voc.names, [0, 1, 2], 3)
    for (image, target), (photo, truth) in zip(yolo, voc, strict=True):
        assert torch.equal(image, photo) and torch.equal(target["labels"], truth["labels"])
        torch.testing.assert_close(target["boxes"], truth["boxes"])
        assert target["size"] == (480, 640)
    (problem,) = check_data(yolo)
    assert problem.kind == "degenerate" and problem.field == "line 4 box"


@pytest.mark.parametrize(
    "names", ["[ant, bee]", "\n- ant\n- bee\ntrain: x\n", "\n  0: ant\n  1: bee\n", "{1: bee, 0: ant}"]
)
def test_yolo_names_are_listed_or_numbered(tmp_path, names):
    dataset = yolo_folder(tmp_path, {"a": "1 0.5 0.5 0.5 0.5\n", "b": "", "c": None}, f"names: {names}")
    assert (dataset.names, dataset.category_ids) == (["ant", "bee"], [0, 1])
    assert [target["labels"].tolist() for _, target in dataset] == [[1], [], []]
    assert dataset[2][1]["boxes"].shape == (0, 4) and check_data(dataset) == []


def test_yolo_numbers_may_have_holes(tmp_path):
    dataset = yolo_folder(tmp_path, {"a": "7 0.5 0.5 0.5 0.5\n3 0.5 0.5 0.2 0.2\n"}, "names: {7: bee, 3: ant}")
    labels = dataset[0][1]["labels"].tolist()
    assert labels == [1, 0] and [dataset.category_ids[label] for label in labels] == [7, 3]


def test_yolo_shares_are_of_the_turned_picture(tmp_path):
    dataset, exif = yolo_folder(tmp_path, {"a": "0 0.5 0.25 0.5 0.5\n"}), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), "grey").save(tmp_path / "images" / "a.png", exif=exif)
    image, target = dataset[0]
    assert image.shape == (3, 60, 40)
    torch.testing.assert_close(dataset.record(0).boxes_xyxy, torch.tensor([[10.0, 0, 30, 30]]).double())
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.5, 0.25, 0.5, 0.5]]))


YOLO_FAULTS = {
    "0 0.5 0.5 0.5": ("non-finite", "line 2 box", "0.5 0.5 0.5"),
    "0 0.5 0.5 0.5 0.5 0.9": ("non-finite", "line 2 box", "0.5 0.5 0.5 0.5 0.9"),
    "0 0.5 nan 0.5 0.5": ("non-finite", "line 2 box", "0.5 nan 0.5 0.5"),
    "0 0.5 0.5 0 0.5": ("degenerate", "line 2 box", "0.5 0.5 0 0.5"),
    "0 30 20 10 10": ("out of image", "line 2 box", "30 20 10 10"),
    "1 0.3 0.3 0.2 0.2": ("duplicate", "line 2 box", "0.3 0.3 0.2 0.2"),
    "2 0.5 0.5 0.5 0.5": ("unknown class", "line 2 class", "2"),
    "bee 0.5 0.5 0.5 0.5": ("unknown class", "line 2 class", "'bee'"),
}


@pytest.mark.parametrize("line", YOLO_FAULTS)
def test_yolo_faults_are_named_by_their_line(tmp_path, line):
    dataset = yolo_folder(tmp_path, {"a": f"1 0.3 0.3 0.2 0.2\n{line}\n"})
    (problem,) = check_data(dataset)
    assert (problem.kind, problem.field, problem.value) == YOLO_FAULTS[line]
    assert problem.file == str(tmp_path / "labels" / "a.txt") and problem.remedy


def test_yolo_files_that_cannot_be_used(tmp_path):
    dataset = yolo_folder(tmp_path, {"a": "", "b": "", "c": ""})
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    (tmp_path / "labels" / "b.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("lost", "classes"):
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    found = [(Path(p.file).name, p.field, p.kind) for p in check_data(dataset)]
    assert found == [
        ("lost.txt", "picture", "orphan"), ("a.png", "picture", "unreadable"), ("b.txt", "content", "unreadable")
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["names: coco.names", "train: x", "names: [", "names: 3", "", None])
def test_yolo_names_that_cannot_be_read(tmp_path, text):
    yolo_folder(tmp_path, {"a": ""})
    (tmp_path / "data.yaml").unlink() if text is None else (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=r"data\.yaml: names is"):
        YoloDataset(tmp_path / "images", tmp_path / "data.yaml")


def test_yolo_folders_that_are_missing(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"labels: folder of labels is missing .*beside `images`"):
        YoloDataset(tmp_path / "images", ["ant"])
    with pytest.raises(DataError, match="folder of images is missing"):
        YoloDataset(tmp_path / "absent" / "images", ["ant"])
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="beside `images`"):
        YoloDataset(tmp_path / "pictures", ["ant"])


# broken files, skipped by choice


def one_of_four_broken(path, reader):
    """The broken picture of a dataset of four in one of three formats, and the dataset as a function of the choice."""
    if reader == "coco":
        rows = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in range(1, 5)]
        coco_folder(path, rows, images=[{"id": i} for i in range(1, 5)])
        broken, make = path / "2.png", lambda **choice: CocoDataset(path, path / "a.json", **choice)
    elif reader == "voc":
        for i in range(4):
            voc_folder(path, [("ant", (1, 1, 9, 9))], stem=f"s{i}")
        broken, make = path / "JPEGImages" / "s1.jpg", lambda **choice: VocDataset(path, "train", **choice)
    else:
        yolo_folder(path, {f"s{i}": "0 0.5 0.5 0.5 0.5\n" for i in range(4)})
        broken, make = path / "images" / "s1.png", lambda **choice: YoloDataset(path / "images", ["ant"], **choice)
    broken.write_bytes(broken.read_bytes()[:60])
    return broken, make


@pytest.mark.parametrize("reader", ["coco", "voc", "yolo"])
def test_unreadable_images_stop_unless_one_chooses_to_skip_them(tmp_path, reader):
    broken, make = one_of_four_broken(tmp_path, reader)
    strict = make()
    assert len(strict) == 4 and strict.skipped == []
    ids = [strict[i][1]["image_id"] for i in (0, 2, 3)]
    with pytest.raises(DataError, match=broken.name):
        strict[1]
    with pytest.warns(UserWarning, match=rf"1 of 4 images are skipped, the first because .*{broken.name}"):
        healthy = make(skip_unreadable=True)
    assert [target["image_id"] for _, target in healthy] == ids, "the others keep their numbers"
    assert [(problem.file, problem.kind) for problem in healthy.skipped] == [(str(broken), "unreadable")]
    assert check_data(healthy) == healthy.skipped == check_data(strict), "what is skipped is still reported"


@pytest.mark.parametrize("reader", ["coco", "voc", "yolo"])
def test_nothing_else_is_skipped(tmp_path, reader, recwarn):
    broken, make = one_of_four_broken(tmp_path, reader)
    Image.new("RGB", (60, 40), "grey").save(broken)
    assert len(make(skip_unreadable=True)) == 4 and not recwarn
    wrong = yolo_folder(tmp_path / "wrong", {"a": "5 0.5 0.5 0.5 0.5\n", "b": ""})
    wrong = YoloDataset(wrong.folder, ["ant"], skip_unreadable=True)
    assert len(wrong) == 2 and wrong.skipped == []
    with pytest.raises(DataError, match="class is 5"):
        wrong[0]


def test_coco_mini_equals_pycocotools(capsys):
    folder = whole_set("coco_mini")
    file = folder / "annotations" / "instances_val2017.json"
    dataset, reference = CocoDataset(folder / "val2017", file, masks=True), COCO(file)
    assert check_data(dataset) == [] and len(dataset) == 79
    crowds = 0
    for index in range(len(dataset)):
        image, target = dataset[index]
        rows = reference.loadAnns(reference.getAnnIds(imgIds=target["image_id"]))
        assert [dataset.category_ids[i] for i in target["labels"]] == [row["category_id"] for row in rows]
        assert target["crowd"].tolist() == [bool(row["iscrowd"]) for row in rows]
        boxes = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4)
        torch.testing.assert_close(xyxy_to_xywh(corners_in_pixels(image, target)), boxes, atol=1e-2, rtol=0)
        for mask, row in zip(target["masks"], rows, strict=True):
            np.testing.assert_array_equal(mask.numpy(), reference.annToMask(row).astype(bool))
        crowds += int(target["crowd"].sum())
    assert crowds == 5


# check_data


def test_bccd_has_the_known_bad_box_here_and_two_in_all():
    (problem,) = check_data(VocDataset(BCCD, "trainval"))
    assert problem.kind == "degenerate" and problem.file.endswith("BloodImage_00343.xml")
    folder = whole_set("bccd")
    found = [p for split in ("trainval", "test") for p in check_data(VocDataset(folder, split))]
    assert [(Path(p.file).stem, p.kind) for p in found] == [
        ("BloodImage_00338", "degenerate"), ("BloodImage_00343", "degenerate")
    ]  # fmt: skip


FAULTS = {
    "degenerate": lambda box: [box[0], box[1], 0.0, box[3]],
    "out of image": lambda box: [1.0, box[1], 0.2, box[3]],
    "non-finite": lambda box: [float("inf"), *box[1:]],
    "unknown class": lambda box: box,
}


@given(st.lists(st.sampled_from([None, *FAULTS]), max_size=12), st.integers(0, 10**6))
def test_planted_faults_are_found_and_nothing_else(plan, seed):
    generator = np.random.default_rng(seed)
    targets = []
    for kind in plan:
        box = [*generator.uniform(0.3, 0.7, 2), *generator.uniform(0.1, 0.5, 2)]
        label = 2 if kind == "unknown class" else 1
        boxes = torch.tensor([FAULTS[kind](box) if kind else box, [0.5, 0.5, 1.0, 1.0]])
        targets.append({"labels": torch.tensor([label, 0]), "boxes": boxes})
    dataset = MemoryDataset(torch.full((len(plan), 3, 20, 30), 90, dtype=torch.uint8), targets, ["a", "b"])
    found = [(p.file, p.kind) for p in check_data(dataset)]
    assert found == [(f"image {i}", kind) for i, kind in enumerate(plan) if kind]


def test_one_broken_file_hides_no_other(tmp_path):
    for stem in ("one", "two", "three", "four"):
        voc_folder(tmp_path, [("ant", (1, 1, 9, 9)), ("ant", (1, 1, 9, 9))], stem=stem)
    (tmp_path / "Annotations" / "one.xml").write_text("<annotation>")
    (tmp_path / "Annotations" / "two.xml").unlink()
    (tmp_path / "JPEGImages" / "three.jpg").unlink()
    seen = []
    problems = check_data(VocDataset(tmp_path, "train", names=["ant"]), report=seen.append)
    assert [p.kind for p in problems] == ["unreadable", "unreadable", "unreadable", "duplicate", "duplicate"]
    assert seen == problems and all(p.file and p.field and p.value and p.remedy for p in problems)


def test_wild_entries_do_not_stop_the_check(tmp_path):
    rows = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}, {"category_id": [1], "bbox": {}}, {"image_id": 2}]
    dataset = coco_folder(tmp_path, rows, images=({"id": 1}, {"id": 2}))
    del dataset.items[0]["file_name"]
    kinds = Counter(p.kind for p in check_data(dataset))
    assert kinds == {"orphan": 1, "unreadable": 1, "non-finite": 1, "unknown class": 1}


def test_rotated_pictures_are_compared_by_their_true_size(tmp_path):
    dataset = coco_folder(tmp_path, [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 50, 5]}])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), "grey").save(tmp_path / "1.png", exif=exif)
    assert [p.kind for p in check_data(dataset)] == ["size", "out of image"]


def test_any_dataset_with_names_can_be_checked():
    class Two(Dataset):
        names = ["a"]

        def __len__(self):
            return 2

        def __getitem__(self, index):
            box = torch.tensor([[0.5, 0.5, 0.2 * index, 0.2]])
            return torch.full((3, 8, 8), 90, dtype=torch.uint8), {"labels": torch.tensor([0]), "boxes": box}

    assert [(p.file, p.kind) for p in check_data(Two())] == [("image 0", "degenerate")]


def test_summary_counts_and_cuts():
    problems = [Problem("f", f"field {i}", "v", "r", KINDS[i % 2]) for i in range(30)]
    text = summary(problems, limit=3)
    assert text.startswith("30 problems: 15 ") and "field 2" in text and "field 3" not in text and "27 more" in text
    assert summary([]) == "no problems found" and summary(problems[:1]).startswith(f"1 problem: 1 {KINDS[0]}\n")


# transforms


boxes_inside = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 59), st.integers(12, 40), st.integers(12, 40)), max_size=1
).map(lambda rows: [(x, y, min(x + w, 130), min(y + h, 90)) for x, y, w, h in rows])


@given(boxes_inside, st.integers(0, 10**6))
def test_boxes_go_where_their_pixels_go(corners, seed):
    torch.manual_seed(seed)
    recipe = train_transform(range(60, 140, 16), 200, crop=(30, 70), before_crop=(70, 90))
    image, target = apply_transform(recipe, *painted((90, 130), corners))
    seen = [corners_of_grey(image, i, spread=15) for i in range(len(corners))]
    for label, told in zip(target["labels"].tolist(), corners_in_pixels(image, target), strict=True):
        if min(told[2:] - told[:2]) > 4:  # thinner parts may be blurred away
            torch.testing.assert_close(seen[label], told, atol=1.6, rtol=0)
    gone = set(range(len(corners))) - set(target["labels"].tolist())
    assert all(seen[i] is None for i in gone)
    assert target["image_id"] == 3 and target["size"] == (90, 130)


@given(st.integers(0, 10**6))
def test_crops_keep_everything_that_belongs_to_a_box_together(seed):
    torch.manual_seed(seed)
    corners = [(5, 5, 25, 25), (40, 8, 60, 30), (8, 40, 30, 60), (70, 60, 95, 85), (50, 45, 62, 57)]
    image, target = painted((90, 100), corners)
    target |= {"masks": image[0] == (40 + 30 * torch.arange(5))[:, None, None], "area": torch.arange(5.0)}
    target["crowd"] = torch.arange(5) % 2 == 0
    image, target = apply_transform(RandomSizeCrop(20, 60), image, target)
    for i, label in enumerate(target["labels"].tolist()):
        told = corners_in_pixels(image, target)[i]
        torch.testing.assert_close(told, corners_of_grey(image, label), atol=1e-3, rtol=0)
        assert torch.equal(target["masks"][i], image[0] == 40 + 30 * label)
        assert target["area"][i] == label and target["crowd"][i] == (label % 2 == 0)
    visible = [label for label in range(5) if corners_of_grey(image, label) is not None]
    assert target["labels"].tolist() == visible


def test_transforms_leave_their_input_alone():
    image, target = painted((90, 130), [(10, 10, 50, 50)])
    before = image.clone(), target["boxes"].clone()
    apply_transform(v2.Compose([v2.RandomHorizontalFlip(1.0), RandomSizeCrop(20, 40)]), image, target)
    torch.testing.assert_close((image, target["boxes"]), before)
    normalise(image)
    torch.testing.assert_close(image, before[0])


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (800, 1066)), ((300, 1000), (400, 1333)), ((1000, 300), (1333, 400))]
)
def test_eval_transform_gives_the_papers_sizes_and_loses_nothing(size, expected):
    image, target = apply_transform(eval_transform(), *painted(size, [(10, 10, 12, 11)]))
    assert image.shape[1:] == expected and len(target["boxes"]) == 1


def paper_size(height, width, short, longest):
    """The authors' rule for the size after a resize, step by step."""
    low, high = min(height, width), max(height, width)
    if longest is not None and high / low * short > longest:
        short = int(round(longest * low / high))
    if width < height:
        return int(short * height / width), short
    return short, int(short * width / height)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 1000), st.integers(600, 1400))
def test_sizes_are_the_authors_to_the_pixel(height, width, short, longest):
    """But for lines of which the authors' rule leaves nothing, and for pictures that would take all memory."""
    for most in (longest, None):
        expected = paper_size(height, width, short, most)
        if math.prod(expected) > 100e6:
            with pytest.raises(ValueError, match=f"a picture of {width} x {height}, resized,.*make it smaller"):
                fitted_size((height, width), short)
        elif min(expected) < 1:
            assert min(fitted_size((height, width), short, most or math.inf)) == 1
        else:
            assert fitted_size((height, width), short, most or math.inf) == expected


def paper_augmentation(size, box, rng):
    """The paper's procedure on one box, in plain Python: size of the picture, corners of the box in shares of it."""
    (height, width), (x0, y0, x1, y1) = size, box
    if rng.random() < 0.5:
        x0, x1 = width - x1, width - x0

    def resized(short, longest):
        new = paper_size(height, width, short, longest)
        return *new, x0 * new[1] / width, y0 * new[0] / height, x1 * new[1] / width, y1 * new[0] / height

    if rng.random() < 0.5:
        height, width, x0, y0, x1, y1 = resized(rng.choice([400, 500, 600]), None)
        columns, rows = rng.randint(384, min(width, 600)), rng.randint(384, min(height, 600))
        left, top = rng.randint(0, width - columns), rng.randint(0, height - rows)
        x0, x1 = (min(max(x - left, 0), columns) for x in (x0, x1))
        y0, y1 = (min(max(y - top, 0), rows) for y in (y0, y1))
        height, width = rows, columns
    height, width, x0, y0, x1, y1 = resized(rng.choice(range(480, 801, 32)), 1333)
    return height, width, x0 / width, y0 / height, x1 / width, y1 / height


def drawn(transform, size, box, count):
    """What a transform makes of one box, many times: the columns of `paper_augmentation`."""
    boxes, rows = tv_tensors.BoundingBoxes([list(map(float, box))], format="XYXY", canvas_size=size), []
    for _ in range(count):
        out = transform({"boxes": boxes})["boxes"]
        height, width = out.canvas_size
        rows.append((height, width, *(out[0] / torch.tensor([width, height, width, height])).tolist()))
    return np.array(rows)


def worst_agreement(ours, paper):
    """The smallest p-value of Kolmogorov and Smirnov's test over the columns, and over products of two of them."""
    pairs, rounded = [(0, 1), (1, 2), (0, 3), (2, 3), (1, 4)], [rows.round(3) for rows in (ours, paper)]
    both = [np.column_stack([rows, *(rows[:, i] * rows[:, j] for i, j in pairs)]) for rows in rounded]
    return min(ks_2samp(a, b).pvalue for a, b in zip(both[0].T, both[1].T, strict=True))


def paper_and_ours(transform, size, count):
    """The same box under the paper's procedure and under a transform, many times."""
    torch.manual_seed(0)
    rng, box = random.Random(1), (0.3 * size[1], 0.25 * size[0], 0.55 * size[1], 0.7 * size[0])
    return np.array([paper_augmentation(size, box, rng) for _ in range(count)]), drawn(transform, size, box, count)


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (400, 1200)])
def test_augmentation_is_distributed_as_the_papers(size):
    assert worst_agreement(*paper_and_ours(train_transform(), size, 4000)) > 1e-3


@pytest.mark.parametrize(
    "change",
    [{"crop": None}, {"flip": 0}, {"crop": (300, 600)}, {"short_sides": range(480, 705, 32)}, {"before_crop": (400,)},
     {"longest": 900}],
)  # fmt: skip
def test_another_recipe_would_be_noticed(change):
    assert worst_agreement(*paper_and_ours(train_transform(**change), (480, 640), 2500)) < 1e-6


def test_the_crop_never_exceeds_a_small_image():
    for seed in range(20):
        torch.manual_seed(seed)
        image, _ = apply_transform(RandomSizeCrop(384, 600), *painted((50, 700), []))
        assert image.shape[1] == 50 and 384 <= image.shape[2] <= 600


# batches


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
def test_padding_hides_nothing_and_shows_nothing(sizes):
    images = [1 + torch.rand(3, *size) for size in sizes]
    batch, pad = pad_images(images)
    assert batch.shape[2:] == (max(y for y, _ in sizes), max(x for _, x in sizes))
    for image, row, hidden in zip(images, batch, pad, strict=True):
        torch.testing.assert_close(row[:, ~hidden].reshape(image.shape), image)
        assert (row[:, hidden] == 0).all()
        assert not hidden[: image.shape[1], : image.shape[2]].any()


def test_normalise_is_exact_and_takes_bytes_only():
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, :, None]
    expected = v2.functional.normalize(image.float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(normalise(image), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(denormalise(normalise(image)), image)
    torch.testing.assert_close(denormalise(normalise(image, (0, 0, 0), (1, 1, 1)), (0, 0, 0), (1, 1, 1)), image)
    with pytest.raises(Exception, match="images"):
        normalise(image.float())
    with pytest.raises(TypeError, match="were they normalised before"):  # and in plain use, without the type checker
        inspect.unwrap(normalise)(image.float())


def test_collate_equals_normalise_then_pad():
    samples = [painted(size, [(1, 1, 5, 5)]) for size in ((8, 9), (9, 8), (20, 6))]
    images, pad = pad_images([normalise(image, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) for image, _ in samples])
    batch = collate(samples, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert torch.equal(batch.images, images) and torch.equal(batch.pad, pad)
    with pytest.raises(ValueError, match="at least one image"):
        collate([])


def test_batches_move_to_a_device_whole():
    batch = collate([painted((8, 9), [(1, 1, 5, 5)]), painted((9, 8), [])]).to("meta")
    assert isinstance(batch, Batch) and {batch.images.device.type, batch.pad.device.type} == {"meta"}
    assert batch.targets[0]["boxes"].device.type == "meta" and batch.targets[0]["image_id"] == 3


@pytest.mark.gpu
def test_pinned_batches_reach_the_card_unchanged():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dataset = VocDataset(BCCD, "trainval")
    for batch, plain in zip(epoch_loader(dataset, RECIPE, 2), epoch_loader(dataset, RECIPE, 2, workers=1), strict=True):
        assert batch.images.is_pinned() and batch.targets[0]["boxes"].is_pinned()
        torch.testing.assert_close(batch.to("cuda").images.cpu(), plain.images)


# loaders


def fingerprint(loader):
    """Everything a loader gives, by image, with the order."""
    return [
        (target["image_id"], target["boxes"], row[:, ~pad]) for batch in loader
        for row, pad, target in zip(batch.images, batch.pad, batch.targets, strict=True)
    ]  # fmt: skip


def assert_same(a, b):
    torch.testing.assert_close([list(row) for row in a], [list(row) for row in b], rtol=0, atol=0)


RECIPE = train_transform(range(60, 140, 16), 200, crop=(30, 70), before_crop=(70, 90))


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (1, 2), (2, 3)])
def test_workers_and_batch_size_change_nothing(workers, batch_size):
    dataset = VocDataset(BCCD, "trainval")
    expected = fingerprint(epoch_loader(dataset, RECIPE, 3, seed=4, epoch=1))
    before = torch.get_rng_state()
    assert_same(fingerprint(epoch_loader(dataset, RECIPE, batch_size, 4, 1, workers)), expected)
    assert torch.equal(torch.get_rng_state(), before)


def whether_shared(samples):
    """A batch, with a first target that tells whether its images lay in shared memory before they were sent."""
    batch = collate(samples)
    return batch._replace(targets=[{"image_id": int(batch.images.is_shared())}])


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_batch_where_the_main_process_reads(workers):
    loader = epoch_loader(VocDataset(BCCD, "trainval"), RECIPE, 2, workers=workers, make_batch=whether_shared)
    assert {batch.targets[0]["image_id"] for batch in loader} == {workers}


def test_seed_and_epoch_change_order_and_augmentation():
    dataset = in_memory(VocDataset(BCCD, "trainval"), (60, 80))
    dataset = MemoryDataset(dataset.images.repeat(8, 1, 1, 1), dataset.targets * 8, dataset.names)
    views = [Transformed(dataset, RECIPE, seed, epoch)[0][0] for seed in range(4) for epoch in range(4)]
    assert len({view.numpy().tobytes() for view in views}) > 8
    def order(seed: int = 0, epoch: int = 0, shuffle: bool = True) -> list[int]:
        loader = epoch_loader(dataset, None, 1, seed, epoch, shuffle=shuffle)
        return [index for batch in loader.batch_sampler for index in batch]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4 and all(sorted(order) == list(range(24)) for order in orders)
    assert order(shuffle=False) == list(range(24))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_keep_their_words_through_workers(tmp_path, workers):
    dataset = coco_folder(tmp_path, [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [0, 0, 5, 5]}])
    with pytest.raises(DataError, match="use one of 1, 5, 90"):
        next(iter(epoch_loader(dataset, None, 1, workers=workers)))
    error = pickle.loads(pickle.dumps(DataError("words")))
    assert str(error) == "words"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_augmented_dataset_hands_out_its_batches(workers):
    cells, rule = VocDataset(BCCD, "trainval"), Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    loader = Augmented(cells, RECIPE, rule, workers).loader(2, seed=4)
    assert len(loader) == 2
    for epoch in (0, 1):
        views, order = Transformed(cells, RECIPE, seed=4, epoch=epoch), epoch_order(3, 4, epoch).tolist()
        expected = [collate([views[i] for i in part], rule.mean, rule.std) for part in (order[:2], order[2:])]
        assert_same(fingerprint(loader.epoch(epoch)), fingerprint(expected))


def painted_memory(size, count=64):
    """Many copies of one painted picture, told apart by image_id, with masks."""
    image, target = painted(size, [(3, 2, 12, 8), (14, 9, 20, 15)])
    masks = image[0] == torch.tensor([40, 70])[:, None, None]
    targets = [{**target, "image_id": i, "masks": masks} for i in range(count)]
    return MemoryDataset(image.repeat(count, 1, 1, 1), targets, ["a", "b"])


@pytest.mark.parametrize(("size", "many"), [((24, 24), 8), ((16, 24), 4)])
def test_memory_loader_turns_picture_boxes_and_masks_alike(size, many):
    views = set()
    for batch in MemoryLoader(painted_memory(size), 16, seed=2).epoch(0):
        assert batch.images.is_contiguous(memory_format=torch.channels_last) and not batch.pad.any()
        for row, target in zip(denormalise(batch.images), batch.targets, strict=True):
            views.add(row.numpy().tobytes())
            for label, told in enumerate(corners_in_pixels(row, target)):
                torch.testing.assert_close(corners_of_grey(row, label), told, atol=1e-3, rtol=0)
                assert torch.equal(target["masks"][label], row[0] == 40 + 30 * label)
    assert len(views) == many


def test_symmetries_are_the_group_of_the_square():
    square = torch.arange(9).reshape(1, 3, 3)
    quarter_turns = [torch.rot90(square, k, (1, 2)) for k in range(4)]
    expected = {tuple(v.flatten().tolist()) for turn in quarter_turns for v in (turn, turn.flip(-1))}
    assert {tuple(flip_transpose(square, s).flatten().tolist()) for s in range(8)} == expected


@settings(max_examples=15)
@given(st.integers(1, 70), st.integers(0, 3), st.integers(0, 3))
def test_batch_size_changes_neither_order_nor_turns(batch_size, seed, epoch):
    dataset = painted_memory((24, 24), count=33)
    loader = MemoryLoader(dataset, batch_size, seed)
    batches = list(loader.epoch(epoch))
    assert len(batches) == len(loader) and sum(len(b.images) for b in batches) == 33
    assert_same(fingerprint(batches), fingerprint(MemoryLoader(dataset, 33, seed).epoch(epoch)))


def test_memory_loader_in_plain_order():
    dataset = painted_memory((16, 24), count=10)
    (batch,) = MemoryLoader(dataset, 16, augment=False, shuffle=False).epoch(3)
    torch.testing.assert_close(denormalise(batch.images), dataset.images)
    assert [t["image_id"] for t in batch.targets] == list(range(10))


def test_images_without_objects_go_through():
    dataset = MemoryDataset(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2, ["a"],
    )  # fmt: skip
    (batch,) = MemoryLoader(dataset, 2).epoch(0)
    assert [t["boxes"].shape for t in batch.targets] == [(0, 4), (0, 4)]
    assert next(iter(epoch_loader(dataset, RECIPE, 2))).targets[0]["boxes"].shape == (0, 4)


def test_in_memory_reports_in_original_pixels():
    dataset = in_memory(VocDataset(BCCD, "trainval"), (60, 80))
    assert dataset.images.shape == (3, 3, 60, 80) and dataset.targets[0]["size"] == (480, 640)
    torch.testing.assert_close(dataset.targets[0]["boxes"], VocDataset(BCCD, "trainval")[0][1]["boxes"])


def test_an_empty_dataset_is_named():
    dataset = MemoryDataset(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), [], ["a"])
    with pytest.raises(ValueError, match="there are 0 images"):
        in_memory(dataset, (4, 4))
    with pytest.raises(ValueError, match="there are 0 images"):
        Augmented(dataset, None)


@pytest.mark.alone
def test_the_fast_path_is_fast():
    images = torch.randint(0, 256, (640, 3, 128, 128), dtype=torch.uint8)
    target = {"labels": torch.zeros(5, dtype=torch.int64), "boxes": torch.rand(5, 4)}
    dataset, times = MemoryDataset(images, [target] * 640, ["a"]), [time.perf_counter()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in MemoryLoader(dataset, 16).epoch(0):
            times.append(time.perf_counter())
    finally:
        torch.set_num_threads(threads)
    assert np.diff(times).min() < 0.006  # about 0.001 on a quiet core of today
