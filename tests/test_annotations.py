"""Annotations as people have them: read where they can mean one thing only, else named with their remedy."""

import json
import math
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import CASES, fault
from PIL import Image
from pycocotools import mask as coco_mask

from detr_nb.checks import KINDS, DataError, check_data, read_outline, unpack_runs
from detr_nb.formats import (
    CocoData,
    CocoDataset,
    Sizes,
    VocDataset,
    YoloDataset,
    outline_to_mask,
    same_key,
    split_name,
)
from detr_nb.loading import Augmented, MemoryDataset
from detr_nb.model import TinyModel
from detr_nb.training import TrainConfig, check_before, fit

SMALL = Sizes((64,), 64, (), eval_side=64)


def case(name, *values):
    """A folder of small inputs."""
    return fault(name, CASES / name, *values)


def read(folder, **options):
    """The dataset in a folder, whose format its files tell."""
    if (folder / "ann.json").exists():
        return CocoDataset(folder / "img", folder / "ann.json", **options)
    if (folder / "data.yaml").exists():
        return YoloDataset(folder / "train" / "images", folder / "data.yaml", **options)
    return VocDataset(folder, "train", **options)


def known(dataset):
    """Kinds of what a training knows before its first step."""
    return [problem.kind for problem in check_before(dataset, dataset.names, "training data")[0]]


def boxes_of(dataset):
    return sum(len(dataset[i][1]["labels"]) for i in range(len(dataset)))


def by_name(dataset):
    """The samples in the order of the pictures' names; folders come first in that of their paths."""
    order = sorted(range(len(dataset)), key=lambda i: dataset.record(i).image.name)
    return [dataset[i] for i in order]


# the small inputs


NAMES = ["cup", "pen"]


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        *(case(name, NAMES) for name in (
            "00_clean", "02_string_image_id", "02b_string_image_id_some", "03_names_as_ids",
            "04_no_area_iscrowd_info",
            "04c_iscrowd_words", "05_size_null", "05b_height_only", "05c_no_size", "06_backslash_names", "07d_bom",
            "09_bbox_words", "11_yolo_clean", "11c_yolo_crlf_bom", "11d_yolo_crlf", "11e_yolo_float_class",
            "12c_yaml_dict", "13_yolo_ppm", "13a_yolo_mixed_ext", "13c_yolo_subfolders", "14_voc_clean",
            "14a_voc_float_boxes", "14b_voc_float_size", "14c_voc_empty_size", "14d_voc_zero_size", "15_voc_spaces",
            "15c_voc_difficult", "15d_voc_dots", "15e_voc_ext_in_list", "15f_voc_case")),
        case("08_supercategory_class", ["desk-things", *NAMES]),
        case("12_yaml_yes_no", ["no", "yes"]),
        case("12b_yaml_null", ["null", "ok"]),
    ],
)  # fmt: skip
def test_what_can_mean_one_thing_only_is_read(folder, names):
    dataset = read(folder, **({"keep_crowd": False} if (folder / "ann.json").exists() else {}))
    assert dataset.names == names and len(dataset) == 3
    assert check_data(dataset) == [] and known(dataset) == []
    plain = {CocoDataset: "00_clean", YoloDataset: "11_yolo_clean", VocDataset: "14_voc_clean"}
    plain = read(CASES / plain[type(dataset)])
    for (_, target), (_, expected) in zip(*map(by_name, (dataset, plain)), strict=True):
        assert torch.equal(target["labels"], expected["labels"] + len(names) - 2)
        torch.testing.assert_close(target["boxes"], expected["boxes"], atol=0.02, rtol=0)
        assert type(target["image_id"]) in (int, str) and target["size"] == (48, 64)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        case("01_duplicate_image_id", r"ann.json: images\[1\] id is 0 \(ambiguous\): images\[0\] has it too"),
        case("07_no_file_name", r"ann.json: images\[1\] file_name is missing"),
        case("07b_result_list", r"ann.json: content is a list of results .*give the annotations"),
        case("07c_category_without_name", r"ann.json: categories\[0\] name is missing"),
        case("08c_duplicate_category_ids", r"categories\[1\] id is 1 \(ambiguous\): categories\[0\] has it too"),
        case("11b_yolo_confidence", r"p0.txt: line 1 box is .* 0.87 .*delete the sixth number: a confidence"),
        case("12d_yaml_dup", r"data.yaml: names\[1\] is 'cup' \(ambiguous\): names\[0\] has it too"),
        case("15a_voc_no_name", r"p0.xml: object\[0\] name is missing .*write its class"),
        case("26_outlines", r"annotations\[1\] \(id 2\) segmentation is \[\[\]\] \(outline\): .*three corners"),
    ],
)
def test_what_can_mean_several_things_is_refused_by_all(folder, words, capsys):
    """By `check_data`, before a training, and by whoever asks for a picture."""
    options = {"masks": True} if folder.name.startswith("26") else {}
    with pytest.raises(DataError, match=words):
        dataset = read(folder, **options)
        for picture in range(len(dataset)):
            dataset[picture]
    if folder.name != "07b_result_list":
        dataset = read(folder, **options)
        assert any(re.search(words, str(problem)) for problem in check_data(dataset))
        with pytest.raises(DataError, match=words):
            known(dataset)


@pytest.mark.parametrize(
    ("folder", "kinds", "words", "count"),
    [
        case("09b_negative_width", ["degenerate"], "give the box an area", 3),
        case("11a_yolo_polygons", ["polygon"], "form of 4 boxes is a polygon", 4),
        case("11f_yolo_empty_file", [], "", 3),
        case("22_thin_in_training", ["thin"], r"img/p0.png: size is 3000 x 1 \(thin\)", 2),
        case("23_exif_raw_space", ["size"], r"size .* is \(48, 64\) \(size\): turned by its EXIF note", 2),
        case("25_ids_differ_train", [], "", 4),
        case("25_ids_differ_val", [], "", 4),
    ],
)
def test_what_is_known_is_said_before_the_first_step(folder, kinds, words, count):
    dataset = read(folder)
    found = check_data(dataset)
    assert [problem.kind for problem in found] == kinds == known(dataset)
    assert all(re.search(words, str(problem)) for problem in found)
    assert boxes_of(dataset) == count


def test_polygons_of_yolo_give_their_boxes():
    polygons, boxes = read(CASES / "11a_yolo_polygons"), read(CASES / "11_yolo_clean")
    for (_, target), (_, expected) in zip(polygons, boxes, strict=True):
        torch.testing.assert_close(target["boxes"], expected["boxes"], atol=1e-5, rtol=0)


# COCO, changed by hand


def coco(path, change=None, text=None, **options):
    """The clean COCO folder with its content changed."""
    folder = Path(shutil.copytree(CASES / "00_clean", path / "coco"))
    content = json.loads((folder / "ann.json").read_text())
    if change is not None:
        content = change(content) or content
    (folder / "ann.json").write_text(json.dumps(content) if text is None else text)
    return CocoDataset(folder / "img", folder / "ann.json", **options)


def put(part, place, **values):
    """Change fields of one row; a value of `...` takes the field away."""

    def change(content):
        content[part][place].update(values)
        for name in [name for name, value in values.items() if value is ...]:
            del content[part][place][name]

    return change


def add(part, row):
    return lambda content: content[part].append(row)


@pytest.mark.parametrize(
    "change",
    [
        fault("COCO: iscrowd '0'", put("annotations", 0, iscrowd="0")),
        fault("COCO area null", put("annotations", 0, area=None)),
        fault("COCO height '64'", put("images", 0, height="48", width="64")),
        fault("COCO height null", put("images", 0, height=None)),
        put("annotations", 0, iscrowd=False),
        put("annotations", 0, iscrowd=None),
        put("annotations", 0, area="300"),
        put("annotations", 0, category_id="1"),
        put("annotations", 0, category_id=1.0),
        put("annotations", 0, image_id="0"),
        put("annotations", 0, image_id=0.0),
        put("annotations", 0, id="one"),
        put("annotations", 0, id=...),
        put("images", 0, id=0.0),
        put("images", 0, id="0"),
        put("images", 0, width=64.0, height="48.0"),
        put("images", 0, width=0, height=0),
        put("categories", 0, id="1"),
        lambda content: content.update(info=None, licenses=None),
    ],
)
def test_coco_values_of_one_meaning_are_taken(tmp_path, change):
    dataset = coco(tmp_path, change, keep_crowd=False)
    clean = CocoDataset(CASES / "00_clean" / "img", CASES / "00_clean" / "ann.json", keep_crowd=False)
    assert check_data(dataset) == [] and known(dataset) == []
    place = next(i for i in range(3) if str(dataset.record(i).image_id) == "0")
    target, expected = dataset[place][1], clean[0][1]
    for field in ("boxes", "labels", "area", "crowd"):
        if dataset.names == clean.names:
            assert torch.equal(target[field], expected[field]), field


@pytest.mark.parametrize(
    ("change", "words"),
    [
        fault("COCO: two images with one id", put("images", 1, id=0),
            r"images\[1\] id is 0 .*images\[0\] has it too"),
        fault("COCO: categories (1, circle) and (1, zebra)", add("categories", {"id": 1, "name": "zebra"}),
            r"categories\[2\] id is 1 .*categories\[0\] has it"),
        fault("COCO: two categories named circle", add("categories", {"id": 9, "name": "cup"}),
            r"categories\[2\] name is 'cup' .*categories\[0\] has it"),
        fault("COCO: no annotation at all", lambda content: content.update(annotations=[]),
            r"number of objects is none in 3 images \(empty\)"),
        fault("COCO: image without id", put("images", 1, id=...),
            r"images\[1\] id is missing .*write a whole number or a text"),
        fault("COCO: category without name", put("categories", 1, name=...), r"categories\[1\] name is missing"),
        fault("COCO: annotation that is a number", add("annotations", 7),
            r"annotations\[4\].* is 7 .*a row has the fields id, category_id, bbox"),
        fault("COCO: images: null", lambda content: content.update(images=None),
            r"content is images: None .*lists of rows"),
        fault("COCO: file is a list of dicts", lambda content: content["images"],
            r"content is \[.*COCO's `instances` files"),
        fault("COCO: category name null", put("categories", 1, name=None), r"categories\[1\] name is None .*a text"),
        (put("categories", 1, name=""), r"categories\[1\] name is '' "),
        (put("categories", 1, name=True), r"categories\[1\] name is True "),
        (put("categories", 1, id=None), r"categories\[1\] id is None "),
        (add("categories", "pan"), r"categories\[2\] is 'pan' "),
        (add("images", None), r"images\[3\] is None .*id, file_name"),
        (put("images", 1, id=[1]), r"images\[1\] id is \[1\] "),
        (put("images", 1, id=True), r"images\[1\] id is True "),
        (put("images", 1, file_name=None), r"images\[1\] file_name is None "),
        (put("images", 1, file_name={}), r"images\[1\] file_name is \{\} "),
        (put("images", 1, height=-48), r"images\[1\] height is -48 .*whole number of pixels"),
        (put("images", 1, width="wide"), r"images\[1\] width is 'wide' "),
        (put("annotations", 1, area="large"), r"annotations\[1\] \(id 2\) area is 'large' .*square pixels"),
        (put("annotations", 1, area=math.nan), r"annotations\[1\] \(id 2\) area is nan "),
        (put("annotations", 1, area=-5), r"annotations\[1\] \(id 2\) area is -5 "),
        (put("annotations", 1, iscrowd="maybe"), r"annotations\[1\] \(id 2\) iscrowd is 'maybe' .*write 0 or 1"),
        (put("annotations", 1, iscrowd=2), r"annotations\[1\] \(id 2\) iscrowd is 2 "),
        (put("annotations", 1, category_id=[1]), r"annotations\[1\] \(id 2\) category_id is \[1\] "),
        (put("annotations", 1, category_id=1.5), r"annotations\[1\] \(id 2\) category_id is 1.5 "),
        (put("annotations", 1, category_id=None), r"annotations\[1\] \(id 2\) class is None .*use one of 1, 2"),
        (put("annotations", 1, category_id="cup"), r"annotations\[1\] \(id 2\) class is 'cup' .*use one of 1, 2"),
        (put("annotations", 1, bbox="1234"), r"annotations\[1\] \(id 2\) box is 1234 \(non-finite\)"),
        (put("annotations", 1, bbox={"x": 1, "y": 2, "w": 3, "h": 4}), r"annotations\[1\] \(id 2\) box is \{"),
        (put("annotations", 1, bbox=[1, 2, 3, 10**400]), r"annotations\[1\] \(id 2\) box is .*\(non-finite\)"),
        (put("annotations", 1, bbox=[1, 2, True, 4]), r"annotations\[1\] \(id 2\) box is .*\(non-finite\)"),
        (put("annotations", 1, bbox=...), r"annotations\[1\] \(id 2\) box is None \(non-finite\)"),
        (lambda content: content.update(categories=[]), r".*class is 1 \(unknown class\)"),
        (lambda content: content.update(annotations={}), r"content is annotations: \{\} "),
        (lambda content: content.pop("categories") and None, r"content is without \['categories'\]"),
    ],
)  # fmt: skip
def test_coco_values_of_no_meaning_are_refused_by_name(tmp_path, change, words, capsys):
    with pytest.raises(DataError, match=r"ann\.json: " + words):
        dataset = coco(tmp_path, change)
        assert any(re.search(words, str(problem)) for problem in check_data(dataset)), check_data(dataset)
        known(dataset)


@pytest.mark.parametrize(
    ("change", "kinds", "words"),
    [
        (put("annotations", 1, image_id=77), ["orphan"], r"annotations\[1\] image_id is 77"),
        (put("annotations", 1, image_id="00"), ["orphan"], r"annotations\[1\] image_id is '00'"),
        (put("annotations", 1, image_id=...), ["orphan"], r"annotations\[1\] image_id is None"),
        (put("annotations", 1, image_id=[0]), ["orphan"], r"annotations\[1\] image_id is \[0\]"),
        (put("annotations", 1, id=1), ["duplicate"], r"annotations\[1\] id is 1 .*annotations\[0\] has it too"),
        (put("images", 1, file_name="p0.png"), ["duplicate"], r"images\[1\] file_name is 'p0.png' .*images\[0\]"),
        (put("images", 1, height=64, width=48), ["size"], "the picture has"),
        (put("annotations", 1, bbox=[35, 20, 60, 20]), ["out of image"], "cut it at 64 columns"),
    ],
)
def test_coco_problems_that_stop_no_training_are_counted(tmp_path, change, kinds, words):
    dataset = coco(tmp_path, change)
    assert [problem.kind for problem in check_data(dataset)] == kinds == known(dataset)
    assert re.search(words, str(check_data(dataset)[0]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "JSONDecodeError.*write JSON there"),
        (b"", "JSONDecodeError"),
        (b"\xb5\xd4\xc2\xeb", "UnicodeDecodeError.*save the file as UTF-8"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_files_that_hold_no_json_are_named(tmp_path, data, words):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.json: content is {words}"):
        CocoDataset(tmp_path, tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_a_text(tmp_path, encoding):
    content = json.loads((CASES / "00_clean" / "ann.json").read_text())
    content["categories"][0]["name"] = "Täßchen"
    (tmp_path / "a.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert CocoDataset(CASES / "00_clean" / "img", tmp_path / "a.json").names == ["Täßchen", "pen"]


def test_records_of_good_files_are_those_of_a_plain_reading():
    """As the reader gave them before its rows had types."""
    file = CASES / "00_clean" / "ann.json"
    content, dataset = json.loads(file.read_text()), CocoDataset(file.parent / "img", file, masks=True)
    for image, record in zip(content["images"], map(dataset.record, range(3)), strict=True):
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        x, y, w, h = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).T
        assert torch.equal(record.boxes_xyxy, torch.stack((x, y, x + w, y + h), 1))
        assert torch.equal(record.area, torch.tensor([row["area"] for row in rows]).float())
        assert record.classes == [row["category_id"] for row in rows] and not record.crowd.any()
        assert (record.image_id, record.size) == (image["id"], (image["height"], image["width"]))
        assert record.written == [row["bbox"] for row in rows] and record.outlines == [[] for _ in rows]


KEYS = st.one_of(st.integers(-3, 30), st.sampled_from(["0", "7", "07", " 7", "a", "7.0", "-1"]))


@given(st.sets(KEYS, max_size=8), KEYS)
def test_a_key_is_found_if_it_reads_the_same(known, key):
    found = same_key(key, known)
    if key in known:
        assert found == key and type(found) is type(key)
    elif any(str(one) == str(key) for one in known):
        assert found in known and str(found) == str(key)
    else:
        assert found == key


ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 70), st.floats(), st.text(max_size=4), st.just(10**400)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    ("images", "id"), ("images", "file_name"), ("images", "height"), ("annotations", "image_id"),
    ("annotations", "category_id"), ("annotations", "bbox"), ("annotations", "area"), ("annotations", "iscrowd"),
    ("annotations", "segmentation"), ("annotations", "id"), ("categories", "id"), ("categories", "name"),
]  # fmt: skip


@given(st.sampled_from(FIELDS), st.integers(0, 1), ANY)
def test_no_value_of_any_field_raises_anything_but_a_data_error(tmp_path_factory, field, place, value):
    """A process that dies in C would end the test too."""
    content = json.loads((CASES / "00_clean" / "ann.json").read_text())
    content[field[0]][place][field[1]] = value
    file = tmp_path_factory.mktemp("any") / "a.json"
    file.write_text(json.dumps(content))
    try:
        dataset = CocoDataset(CASES / "00_clean" / "img", file, masks=True)
    except DataError as error:
        assert "a.json" in str(error)
        return
    found = check_data(dataset)
    wild = [problem for problem in found if re.search("Error: ", problem.value)]
    assert {problem.kind for problem in found} <= set(KINDS)
    assert all(problem.field == "picture" for problem in wild), "only what Pillow says is quoted"
    for index in range(len(dataset)):
        try:
            dataset[index]
        except DataError as error:
            assert any(str(error) == str(problem) for problem in found)


# outlines and run lengths


SQUARE = [4, 5, 24, 5, 24, 20, 4, 20]


@pytest.mark.parametrize(
    ("outline", "words"),
    [
        fault("run lengths {'counts': [5, 5], 'size': [10^6, 10^6]} in annotations.json, masks=True",
            {"counts": [5, 5], "size": [10**6, 10**6]},
            r"its size is \[1000000, 1000000\], the picture has \[48, 64\]"),
        fault("30 B of run lengths claiming 60000 x 60000", {"counts": "PPYo1", "size": [60000, 60000]},
            r"its size is \[60000, 60000\]"),
        fault("run lengths of 32 x 32 for a picture of 64 x 64", {"counts": [32 * 32], "size": [32, 32]},
            r"its size is \[32, 32\], the picture has"),
        fault("segmentation {'counts': 'zz'}", {"counts": "zz", "size": [48, 64]},
            "'z' is no letter of packed run lengths"),
        fault("negative counts", {"counts": [-3, 3075], "size": [48, 64]},
            "its counts must be 0 or more, and 3072 in all"),
        fault("segmentation 'abc', [[1, 2]], [['a'] * 6]", "abc", "write a list of polygons, or run lengths"),
        ([[1, 2]], "three corners; 2 numbers are none"),
        ([["a"] * 6], "x and y of each corner as finite numbers"),
        ([SQUARE, [4, 5, 24, 20]], "three corners; 4 numbers are none"),
        ([[4, 5, 24, 5, 24, 20, 4]], "three corners; 7 numbers are none"),
        ([[]], "three corners; 0 numbers are none"),
        ([4, 5, 24, 20], "three corners; 4 numbers are none"),
        ([[4, 5, 24, 5, 24, math.nan]], "finite numbers"),
        ([[4, 5, 24, 5, 24, 10**400]], "finite numbers"),
        ([[4, 5, 24, 5, 24, 10**9]], "far outside of the 48 x 64 picture"),
        ([[[4, 5], [24, 5], [24, 20]]], "x and y of each corner"),
        ([{"x": 1}], "x and y of each corner"),
        ({"size": [48, 64]}, "write its counts as a list"),
        ({"counts": None, "size": [48, 64]}, "write its counts as a list"),
        ({"counts": [3000, "72"], "size": [48, 64]}, "write its counts as a list"),
        ({"counts": [3000.0, 72], "size": [48, 64]}, "write its counts as a list"),
        ({"counts": [5, 5], "size": [48, 64]}, "3072 in all"),
        ({"counts": [], "size": [48, 64]}, "3072 in all"),
        ({"counts": "", "size": [48, 64]}, "3072 in all"),
        ({"counts": "P", "size": [48, 64]}, "break off"),
        ({"counts": "o" * 40, "size": [48, 64]}, "no letter"),
        ({"counts": [3072], "size": 48}, "its size is 48|write"),
        ({"counts": [3072], "size": "48 64"}, "its size is"),
        ({}, "write its counts"),
        (7, "write a list of polygons"),
        (True, "write a list of polygons"),
    ],
)  # fmt: skip
def test_outlines_that_fit_no_picture_never_reach_c(tmp_path, outline, words):
    """Refused with file and entry when loaded, found by the check, and the process lives."""
    dataset = coco(tmp_path, put("annotations", 0, segmentation=outline), masks=True)
    words = rf"ann\.json: annotations\[0\] \(id 1\) segmentation is .*\(outline\): .*(?:{words})"
    with pytest.raises(DataError, match=words):
        dataset[0]
    (problem,) = check_data(dataset)
    assert problem.kind == "outline" and re.search(words, str(problem))
    with pytest.raises(DataError, match=words):
        known(dataset)
    with pytest.raises(ValueError):
        outline_to_mask(outline, (48, 64))
    plain = coco(tmp_path / "plain", put("annotations", 0, segmentation=outline))
    assert check_data(plain) == [], "who wants no masks does not care"


@pytest.mark.fault("the same, check_data")
def test_the_check_reads_outlines(tmp_path):
    lies = {"counts": [5, 5], "size": [10**6, 10**6]}
    dataset = coco(tmp_path, put("annotations", 2, segmentation=lies), masks=True)
    assert [(problem.kind, problem.field) for problem in check_data(dataset)] == [
        ("outline", "annotations[2] (id 3) segmentation")
    ]


@pytest.mark.parametrize("outline", [[SQUARE], SQUARE, [list(map(str, SQUARE))], [list(map(float, SQUARE))]])
def test_one_polygon_may_lack_its_list(outline):
    expected = coco_mask.decode(coco_mask.frPyObjects([SQUARE], 48, 64))[..., 0]
    assert (outline_to_mask(outline, (48, 64)).numpy() == expected).all()


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=30))
def test_run_lengths_are_unpacked_as_pycocotools_packs_them(runs):
    packed = coco_mask.frPyObjects({"counts": runs, "size": [sum(runs), 1]}, sum(runs), 1)["counts"]
    assert unpack_runs(packed) == unpack_runs(packed.decode()) == runs


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_masks_come_back_from_both_kinds_of_run_lengths(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {**packed, "counts": packed["counts"].decode()}
    plain = {"size": [height, width], "counts": unpack_runs(packed["counts"])}
    for outline in (packed, text, plain, {"counts": plain["counts"]}):
        assert (outline_to_mask(outline, (height, width)).numpy() == mask).all()
    assert read_outline([], (height, width)) is read_outline(None, None) is None


# YOLO


def yolo(path, lines=None, names="names: [cup, pen]\n"):
    """The clean YOLO folder, where p0 has other lines."""
    folder = Path(shutil.copytree(CASES / "11_yolo_clean", path / "yolo"))
    if lines is not None:
        (folder / "train" / "labels" / "p0.txt").write_text(lines, encoding="utf8")
    (folder / "data.yaml").write_text(names, encoding="utf8")
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        fault("YOLO: names [yes, no, on]", "names: [yes, no, on]", ["yes", "no", "on"]),
        ("names: [1, 2.0, 0x10]", ["1", "2.0", "0x10"]),
        ("names: {1: off, 0: 'true'}", ["true", "off"]),
        ("names: [null, 2024-01-01]", ["null", "2024-01-01"]),
        ("\ufeffnames:\r\n- cup\r\n- pen\r\n", ["cup", "pen"]),
        ("a: &a cup\nnames: [*a, pen]\n", ["cup", "pen"]),
        ("names: [!!python/name:os.system '', x]", None),
    ],
)
def test_names_are_the_words_that_stand_there(tmp_path, names, expected):
    folder = yolo(tmp_path, names=names)
    if expected is None:
        with pytest.raises(DataError, match=r"data\.yaml: names is"):
            read(folder)
    else:
        assert read(folder).names == expected


BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        fault("YOLO: names by nested YAML aliases", f"{BILLION}names: *i\n", r"names\[0\] is no word"),
        fault("YOLO: names [circle, circle, triangle]", "names: [circle, circle, triangle]",
            r"names\[1\] is 'circle' \(ambiguous\): names\[0\] has it too"),
        ("names: [cup, [pen]]", r"names\[1\] is no word"),
        ("names: [cup, ~]", r"names\[1\] is no word"),
        ("names: [cup, ]\nnc: 2\nnames: [pen]", "names stands there 2 times"),
        ("names: {0: cup, 0: pen}", "a number has two names"),
        ("names: {zero: cup}", "names is ValueError"),
        ("names: " + "[" * 1200, "names is"),
        ("names: []", r"list of classes is empty|class is 0"),
    ],
)  # fmt: skip
def test_names_of_no_meaning_are_refused(tmp_path, names, words, capsys):
    folder = yolo(tmp_path, names=names)
    with pytest.raises(DataError, match=words):
        known(read(folder))


@pytest.mark.parametrize(
    "lines",
    [
        fault("YOLO: text file with a BOM", "\ufeff1 0.5 0.5 0.5 0.5\n"),
        fault("YOLO: polygon lines", "1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"),
        "1.0 .5 .5 .5 .5",
        "\n\n  1\t0.5 0.5 5e-1 0.5  \r\n\r\n",
        "1 0.25 0.25 0.75 0.5 0.5 0.75",
    ],
)
def test_yolo_lines_of_one_meaning_are_taken(tmp_path, lines):
    dataset = read(yolo(tmp_path, lines))
    target = dataset[0][1]
    assert target["labels"].tolist() == [1]
    torch.testing.assert_close(target["boxes"], torch.full((1, 4), 0.5))
    assert {problem.kind for problem in check_data(dataset)} <= {"polygon"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("0 .5 .5 .5 .5 .9", "delete the sixth number"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "write a class and four numbers, or x and y of each corner"),
        ("0 .1 .1 .2 .2 .3 wide", "not finite: 'wide'"),
        ("0 .1 .1 .2 nan .3 .3", "write finite numbers, or delete the polygon"),
        ("0 .5 .5", "write four finite numbers"),
        ("0", "write four finite numbers"),
        ("0.5 .5 .5 .5 .5", r"class is '0.5' \(unknown class\)"),
        ("nan .5 .5 .5 .5", r"class is 'nan' \(unknown class\)"),
    ],
)
def test_yolo_lines_of_no_meaning_are_refused(tmp_path, lines, words):
    dataset = read(yolo(tmp_path, lines))
    with pytest.raises(DataError, match=rf"p0\.txt: line 1 .*{words}"):
        known(dataset)
    with pytest.raises(DataError, match=rf"p0\.txt: line 1 .*{words}"):
        dataset[0]


@pytest.mark.fault("YOLO: label files end in .TXT")
def test_endings_of_text_files_may_be_large(tmp_path):
    folder = yolo(tmp_path)
    for file in (folder / "train" / "labels").iterdir():
        file.rename(file.with_suffix(".TXT"))
    assert boxes_of(read(folder)) == 4 and check_data(read(folder)) == []
    (folder / "train" / "labels" / "p9.TXT").write_text("")
    assert [problem.kind for problem in check_data(read(folder))] == ["orphan"]


@pytest.mark.fault("YOLO: labels of another set")
def test_labels_of_another_set_are_refused(tmp_path, capsys):
    folder = yolo(tmp_path)
    for file in (folder / "train" / "labels").iterdir():
        file.rename(file.with_stem(f"other_{file.stem}"))
    kinds = [problem.kind for problem in check_data(read(folder))]
    assert kinds == ["orphan"] * 3 + ["empty"]
    with pytest.raises(DataError, match="none in 3 images.*belong to these pictures"):
        known(read(folder))
    assert "3 orphan, 1 empty" in capsys.readouterr().err


def test_pictures_that_are_left_out_are_counted(tmp_path):
    folder = yolo(tmp_path)
    images = folder / "train" / "images"
    for name in ("a.heic", "b.heic", "c.svg", "notes.txt", ".hidden.png", "._p0.png"):
        (images / name).write_bytes(b"x")
    (images / ".ipynb_checkpoints").mkdir()
    shutil.copy(images / "p0.png", images / ".ipynb_checkpoints" / "p0-checkpoint.png")
    (problem,) = check_data(read(folder))
    assert (problem.kind, problem.value) == ("left out", "2 .heic, 1 .svg") and known(read(folder)) == ["left out"]
    for file in images.glob("p*.png"):
        file.unlink()
    with pytest.raises(DataError, match="pictures is none; left out: 2 .heic, 1 .svg"):
        read(folder)


@pytest.mark.parametrize("part", ["images", "labels"])
def test_two_files_of_one_stem_are_ambiguous(tmp_path, part):
    folder = yolo(tmp_path)
    file = next((folder / "train" / part).glob("p1.*"))
    shutil.copy(file, file.with_suffix(".bmp" if part == "images" else ".TXT"))
    with pytest.raises(DataError, match=r"\(ambiguous\): .* has the same name"):
        known(read(folder))


@pytest.mark.fault("YOLO: EXIF orientation stored as text")
def test_an_orientation_may_be_a_text(tmp_path):
    folder, entry = yolo(tmp_path), struct.pack("<HHHI4sI", 1, 0x0112, 2, 2, b"6", 0)  # type 2 is ASCII
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry
    Image.new("RGB", (64, 48), "grey").save(folder / "train" / "images" / "p0.png", exif=exif)
    dataset = read(folder)
    assert dataset[0][1]["size"] == dataset.record(0).size and known(dataset) == []


# VOC


def voc(path):
    return Path(shutil.copytree(CASES / "14_voc_clean", path / "voc"))


@pytest.mark.fault("VOC: a.jpg and a.png")
def test_two_pictures_of_one_voc_stem_are_named(tmp_path):
    folder = voc(tmp_path)
    Image.new("RGB", (10, 10), "grey").save(folder / "JPEGImages" / "p1.png")
    (problem,) = (problem for problem in check_data(read(folder)) if problem.kind == "ambiguous")
    assert "p1.png" in problem.file and "p1.jpg has the same name" in problem.remedy
    with pytest.raises(DataError, match="p1.jpg has the same name"):
        read(folder)[0]


@pytest.mark.fault("VOC: one XML file in GBK")
def test_xml_in_gbk_is_read(tmp_path):
    folder = voc(tmp_path)
    file = folder / "Annotations" / "p1.xml"
    text = file.read_text().replace("cup", "杯子")
    file.write_bytes(('<?xml version="1.0" encoding="GBK"?>\n' + text).encode("gbk"))
    dataset = read(folder)
    assert dataset.names == ["cup", "pen", "杯子"] and dataset[1][1]["labels"].tolist() == [2]
    assert check_data(dataset) == []
    file.write_bytes(text.encode("gbk"))  # without the header it is no UTF-8
    with pytest.raises(DataError, match=r"p1\.xml: content is"):
        known(read(folder))


@pytest.mark.parametrize("encoding", [b"nonsense", b"hex"])
def test_xml_of_unknown_encodings_is_named(tmp_path, encoding):
    folder, head = voc(tmp_path), b'<?xml version="1.0" encoding="%s"?>' % encoding
    file = folder / "Annotations" / "p1.xml"
    file.write_bytes(head + file.read_bytes())
    with pytest.raises(DataError, match=r"p1\.xml: content is"):
        known(read(folder))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<width>64</width>", "<width>wide</width>", r"p0\.xml: size width is 'wide' .*whole number of pixels"),
        ("<width>64</width>", "<width>-64</width>", r"p0\.xml: size width is '-64'"),
        ("<name>cup</name>", "<name> </name>", r"p0\.xml: object\[0\] name is missing"),
        ("<xmin>4</xmin>", "<xmin>left</xmin>", r"p0\.xml: object\[0\] box is left 5 24 20 \(non-finite\)"),
        ("<xmin>4</xmin>", "", r"p0\.xml: object\[0\] box is None 5 24 20 \(non-finite\)"),
    ],
)
def test_voc_values_of_no_meaning_are_named(tmp_path, old, new, words):
    folder = voc(tmp_path)
    file = folder / "Annotations" / "p0.xml"
    file.write_text(file.read_text().replace(old, new))
    dataset = read(folder)
    with pytest.raises(DataError, match=words):
        dataset[0]
    with pytest.raises(DataError, match=words):
        known(dataset)


@pytest.mark.parametrize(
    ("line", "stem"),
    [
        ("cup", "cup"), ("cup 1", "cup"), ("cup -1", "cup"), ("  cup  0 ", "cup"), ("cup (1)", "cup (1)"),
            ("cup (1) 1", "cup (1)"),
        ("cup (1).JPG", "cup (1)"), ("cup 7", "cup 7"), ("cup 1.jpg", "cup 1"), ("day/cup", "day/cup"),
            ("cup more words", "cup"),
        ("lost 1", "lost"), ("lost (2)", "lost (2)"), ("v1.0", "v1.0"),
    ],
)  # fmt: skip
def test_lines_of_a_split_mean_the_pictures_there_are(line, stem):
    assert split_name(line, {"cup", "cup (1)", "cup 7", "cup 1" if "jpg" in line else "x", "day/cup", "v1.0"}) == stem


def test_a_missing_voc_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="JPEGImages: folder is missing .*JPEGImages, Annotations and ImageSets"):
        VocDataset(tmp_path, "train")


# emptiness, and what a training says


@pytest.mark.parametrize("colour", ["black", "white"])
def test_pictures_in_which_nothing_can_be_seen_are_named(tmp_path, colour):
    dataset = coco(tmp_path)
    Image.new("RGB", (64, 48), colour).save(dataset.folder / "p1.png")
    (problem,) = check_data(dataset)
    assert (problem.kind, problem.value) == ("blank", f"{colour} all over") and problem.file.endswith("p1.png")


def test_boxes_that_are_all_dropped_are_no_boxes(tmp_path, capsys):
    def crowds(content):
        for row in content["annotations"]:
            row["iscrowd"] = 1

    dataset = coco(tmp_path, crowds, keep_crowd=False)
    assert [problem.kind for problem in check_data(dataset)] == ["empty"]
    with pytest.raises(DataError, match="none in 3 images"):
        known(dataset)
    assert known(CocoDataset(dataset.folder, dataset.file)) == [], "held-out crowds are of use"


def test_sets_in_memory_without_objects_are_refused():
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    data = MemoryDataset(torch.full((2, 3, 8, 8), 90, dtype=torch.uint8), [nothing] * 2, ["cup"])
    with pytest.raises(DataError, match="none in 2 images"):
        check_before(data, ["cup"], "training data")
    assert [problem.kind for problem in check_data(data)] == ["empty"]
    one = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    good = MemoryDataset(data.images, [one] * 2, ["cup"])
    assert known(good) == [], "their boxes are shares, as they must be"


def run_config(train, val=CASES / "00_clean", **model):
    data = CocoData(train / "img", train / "ann.json", val / "img", val / "ann.json", sizes=SMALL, workers=0)
    model = TinyModel(enc_layers=0, dec_layers=1, **model)
    return TrainConfig(data=data, model=model, steps=1, batch_size=2, evaluations=0, progress=False, log_every=1)


@pytest.mark.fault("25c_val_lacks_a_class")
def test_held_out_data_that_lack_a_class_are_refused_before_the_first_step():
    train, val = CASES / "25_ids_differ_train", CASES / "25c_val_lacks_a_class"
    with pytest.raises(ValueError, match=r"held-out data: its classes are \['cup'\], .* have \['cup', 'pen'\]"):
        fit(run_config(train, val), watch=pytest.fail)


@pytest.mark.fault("90 objects a picture, 16 queries")
def test_a_training_says_in_one_summary_what_it_leaves_out(tmp_path, capsys):
    def change(content):
        rows = [{**content["annotations"][0], "id": 10 + i, "bbox": [i, i, 9, 9]} for i in range(20)]
        rows += [{**rows[0], "id": 50, "bbox": [5, 5, 0, 9]}, {**rows[0], "id": 51, "image_id": 77}]
        rows += [{**rows[0], "id": 52, "bbox": [60, 40, 30, 30]}]
        content["annotations"] += rows

    folder = coco(tmp_path, change).file.parent
    run = fit(run_config(folder))
    said = capsys.readouterr().err
    assert run.step == 1 and "held-out" not in said, "of good data nothing is said"
    assert "training data: 4 problems: 1 crowded, 1 orphan, 1 degenerate, 1 out of image" in said
    assert "`detr-nb check-data` lists all" in said and len(said.splitlines()) < 8
    dataset = CocoDataset(folder / "img", folder / "ann.json")
    assert check_data(dataset, queries=16)[-1].kind == "crowded" != check_data(dataset, queries=30)[-1].kind


@pytest.mark.fault("COCO: one picture 2000 x 1")
def test_a_thin_picture_is_named_before_the_first_step(tmp_path):
    """The rule of the run decides: at most 64 pixels long it is a line; before a crop it would be gigantic."""
    dataset = coco(tmp_path, put("images", 0, height=2000, width=1))
    Image.new("RGB", (1, 2000), "grey").save(dataset.folder / "p0.png")
    config = run_config(dataset.file.parent).data
    train, _ = config.load()
    problems, _ = check_before(train, train.names, "training data")
    (thin,) = (problem for problem in problems if problem.kind == "thin")
    assert "p0.png" in thin.file and thin.value == "2000 x 1" and "at most 64 pixels" in thin.remedy
    assert "thin" in [problem.kind for problem in check_data(train.dataset)]
    train, _ = replace(config, sizes=Sizes()).load()
    with pytest.raises(DataError, match=r"p0\.png: size is 2000 x 1 .*cut it up"):
        check_before(train, train.names, "training data")


@pytest.mark.fault("the same with workers")
def test_a_thin_picture_is_learned_from_in_processes_of_their_own(tmp_path, capsys):
    dataset = coco(tmp_path, put("images", 0, height=2000, width=1))
    Image.new("RGB", (1, 2000), "grey").save(dataset.folder / "p0.png")
    config = run_config(dataset.file.parent)
    run = fit(replace(config, batch_size=3, data=replace(config.data, workers=1)))
    assert run.step == 1 and run.skipped == 0, "and its loss was a number"
    assert "p0.png: size is 2000 x 1 (thin)" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"p0\.png: size is 2000 x 1 .*cut it up"):
        fit(replace(config, data=replace(config.data, workers=1, sizes=Sizes())), watch=pytest.fail)


def test_pictures_are_not_read_before_a_training(tmp_path, monkeypatch):
    dataset = coco(tmp_path)
    monkeypatch.setattr("detr_nb.formats.read_image", lambda path: pytest.fail("a picture was read"))
    assert known(dataset) == []
    monkeypatch.setattr("detr_nb.formats.HEADS", 2)
    seen = []
    monkeypatch.setattr("detr_nb.formats.picture_size", lambda path: seen.append(path) or (48, 64))
    assert known(dataset) == [] and len(seen) == 2


def test_what_is_skipped_by_choice_stops_no_training(tmp_path):
    dataset = coco(tmp_path, put("images", 1, id=...))
    (dataset.folder / "p2.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="2 of 3 images are skipped"):
        healthy = CocoDataset(dataset.folder, dataset.file, skip_unreadable=True)
    assert len(healthy) == 1
    assert known(healthy) == ["orphan", "left out", "left out"]
    assert boxes_of(healthy) == 2


def test_what_lies_under_transforms_is_known(tmp_path):
    dataset = coco(tmp_path, put("annotations", 1, image_id=77))
    problems, most = check_before(Augmented(dataset, None), dataset.names, "training data")
    assert [problem.kind for problem in problems] == ["orphan"] and most == 1
