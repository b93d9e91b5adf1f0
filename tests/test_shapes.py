"""The generator of scenes: limits that always hold, the same scene everywhere, caches that are never stale."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou

from detr_nb import cache, shapes
from detr_nb.cache import (
    DRAWING,
    FINGERPRINTS,
    drawing_fingerprint,
    render_scenes,
    series_key,
)
from detr_nb.config import ConfigError
from detr_nb.formats import coco_json, write_coco
from detr_nb.shapes import (
    DEFAULT,
    EASY,
    HARD,
    NAMES,
    SceneConfig,
    Scenes,
    make_scene,
    place,
    scene_target,
)

SMALL = replace(DEFAULT, size=48)


def same(one, two):
    """Are two targets equal, field by field?"""
    return one.keys() == two.keys() and all(
        torch.equal(one[key], two[key]) if isinstance(one[key], torch.Tensor) else one[key] == two[key] for key in one
    )


@st.composite
def configs(draw):
    low, high = sorted(draw(st.tuples(st.floats(0.03, 1), st.floats(0.03, 1))))
    few, many = sorted(draw(st.tuples(st.integers(0, 12), st.integers(0, 12))))
    return SceneConfig(
        size=draw(st.integers(8, 64)), classes=draw(st.integers(1, 8)), min_objects=few, max_objects=many,
        min_side=low, max_side=high, max_overlap=draw(st.sampled_from([0, 0.2, 0.5, 1])),
        clutter=draw(st.integers(0, 4)), contrast=draw(st.floats(0, 1)), noise=draw(st.floats(0, 1)),
        stripes=draw(st.floats(0, 1)),
    )


@settings(max_examples=40)
@given(configs(), st.integers(0, 2**40), st.integers(0, 2**40))
def test_what_is_stated_holds_in_every_scene(config, seed, index):
    try:
        scene = make_scene(config, seed, index)
    except ConfigError as error:
        assert config.min_objects > 1 and "has room for" in str(error)
        return
    count, size = len(scene.labels), config.size
    assert scene.image.shape == (size, size, 3) and scene.owner.shape == (size, size)
    assert count <= config.max_objects and scene.boxes_xyxy.shape == (count, 4)
    assert count >= min(config.min_objects, 1)
    assert set(scene.labels.tolist()) <= set(range(config.classes))
    assert set(np.unique(scene.owner).tolist()) <= set(range(count + 1))
    boxes = torch.from_numpy(scene.boxes_xyxy)
    longest = (boxes[:, 2:] - boxes[:, :2]).amax(1) / size
    assert ((longest >= config.min_side - 1e-4) & (longest <= config.max_side + 1e-4)).all()
    assert ((boxes >= -1e-3) & (boxes <= size + 1e-3)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
    assert not count or overlaps.max() <= config.max_overlap + 1e-4
    again = make_scene(config, seed, index)
    assert all((a == b).all() for a, b in zip(scene, again, strict=True))


def test_the_recorded_scenes_are_held_still():
    """Recorded trainings used these scenes: whoever changes them makes those records worthless."""
    recorded = {
        (EASY, 1): ([1], [[63.022, 18.285, 80.484, 35.748]], [63.105, 118.058, 157.158]),
        (DEFAULT, 1): ([3], [[65.614, 19.108, 78.53, 31.599]], [62.192, 119.275, 158.965]),
    }
    for (config, seed), (labels, boxes, mean) in recorded.items():
        scene = make_scene(config, seed, 3)
        assert scene.labels.tolist() == labels
        np.testing.assert_allclose(scene.boxes_xyxy, boxes, atol=0.01)
        np.testing.assert_allclose(scene.image.mean((0, 1)), mean, atol=0.05)


def test_the_same_scene_in_another_process():
    code = (
        "import hashlib; from detr_nb.shapes import DEFAULT, make_scene; s = make_scene(DEFAULT, 5, 7);"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in s)).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env=os.environ | {"PYTHONHASHSEED": "7"})
    scene = make_scene(DEFAULT, 5, 7)
    assert run.stdout.strip() == hashlib.sha256(b"".join(a.tobytes() for a in scene)).hexdigest()


@pytest.mark.parametrize("label", range(len(NAMES)))
def test_masks_agree_with_points_in_polygons(label):
    """Matplotlib's point-in-polygon test knows nothing of Pillow."""
    lone = replace(HARD, size=96, max_objects=1, min_objects=1, min_side=0.5)
    found = 0
    for index in range(60):
        rng = np.random.default_rng((0, index))
        shapes.background(rng, lone)
        (thing,) = place(rng, lone)
        if thing.label != label:
            continue
        found += 1
        y, x = np.mgrid[:96, :96] + 0.5
        points = np.stack((x.ravel(), y.ravel()), 1)
        inside = [Outline(contour).contains_points(points).reshape(96, 96) for contour in thing.contours]
        expected = inside[0] & ~inside[-1] if len(inside) > 1 else inside[0]
        mask = make_scene(lone, 0, index).owner == 1
        assert (mask & expected).sum() / (mask | expected).sum() > 0.9
        rows, columns = np.nonzero(mask)
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(box - np.array(thing.box_xyxy)).max() < 2
    assert found


def test_later_objects_hide_earlier_ones_and_pixels_have_one_owner():
    masks = [scene_target(make_scene(DEFAULT, 0, index), index, masks=True)["masks"] for index in range(30)]
    assert all((m.sum(0) <= 1).all() for m in masks)
    areas = [scene.boxes_xyxy for scene in (make_scene(DEFAULT, 0, index) for index in range(30))]
    for boxes in areas:
        size = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert (np.diff(size) <= 1e-2).all(), "largest first"


def test_objects_differ_from_what_lies_under_them():
    """Without noise, an object's mean colour is about as far from the background as asked."""
    config = replace(EASY, min_objects=1, max_objects=1, noise=0, contrast=0.4)
    for index in range(20):
        scene, rng = make_scene(config, 0, index), np.random.default_rng((0, index))
        ground = shapes.background(rng, config)
        inside = scene.owner == 1
        distance = np.abs(scene.image[inside].mean(0) / 255 - ground[inside].mean(0)).mean()
        assert distance > 0.3


def test_classes_and_turns_are_even():
    rng = np.random.default_rng(0)
    things = [shapes.propose(rng, replace(HARD, size=64)) for _ in range(2400)]
    counts = np.bincount([thing.label for thing in things], minlength=8)
    assert ((counts - 300) ** 2 / 300).sum() < 26  # chi-square with 7 degrees of freedom, one in two thousand


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 4}, "size is 4: it must be"), ({"classes": 0}, "classes is 0: it must be"),
        ({"classes": 9}, "classes is 9: it must be a whole number of at least 1 and at most 8"),
        ({"min_objects": 11}, "max_objects=10"),
        ({"min_objects": -1}, "min_objects is -1: it must be"), ({"max_objects": 256}, "255"),
        ({"min_side": 0}, "min_side is 0: it must be"), ({"min_side": 0.6}, "max_side=0.5"),
        ({"max_side": 1.5}, "max_side is 1.5: it must be"),
        ({"max_overlap": -0.1}, "max_overlap is -0.1: it must be"), ({"clutter": -1}, "clutter is -1: it must be"),
        ({"contrast": 2}, "contrast is 2: it must be"), ({"noise": float("nan")}, "noise is nan: it must be"),
        ({"stripes": -0.1}, "stripes is -0.1: it must be"),
        ({"min_side": float("nan")}, "min_side is nan: it must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        Scenes(replace(DEFAULT, **change), 1, 0)


def test_a_series_as_a_dataset():
    scenes = Scenes(SMALL, 5, 0, masks=True)
    image, target = scenes[2]
    scene = make_scene(SMALL, 0, 2)
    assert len(scenes) == 5 and image.is_contiguous()
    assert (image.permute(1, 2, 0).numpy() == scene.image).all()
    expected = box_convert(torch.from_numpy(scene.boxes_xyxy), "xyxy", "cxcywh") / 48
    torch.testing.assert_close(target["boxes"], expected)
    assert target["size"] == (48, 48) and target["image_id"] == 2
    assert scenes.names == list(NAMES[:6]) and scenes.category_ids == [1, 2, 3, 4, 5, 6]
    assert len(list(scenes)) == 5
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=f"scene {wrong} of a series of 5: give 0 to 4"):
            scenes[wrong]
    for wrong in ({"count": -1, "seed": 0}, {"count": 1, "seed": -1}):
        with pytest.raises(ValueError, match="is -1: it must be a whole number of at least 0"):
            Scenes(SMALL, **wrong)


def test_two_series_share_no_scene():
    seen = {make_scene(SMALL, seed, index).image.tobytes() for seed in range(4) for index in range(10)}
    assert len(seen) == 40


def as_it_is(item):
    return item


def test_loader_workers_read_the_same_items():
    scenes = Scenes(SMALL, 12, 0)
    loaded = list(DataLoader(scenes, batch_size=None, num_workers=2, collate_fn=as_it_is))
    assert all(torch.equal(a[0], b[0]) and same(dict(a[1]), dict(b[1])) for a, b in zip(loaded, scenes, strict=True))


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, max_objects=0, min_objects=0)])
@pytest.mark.parametrize("masks", [False, True])
def test_drawn_by_one_by_two_and_read_from_a_file_are_equal(config, masks, tmp_path):
    scenes = Scenes(config, 40, 0, masks)
    renderings = [render_scenes(scenes, None, 1), render_scenes(scenes, None, 2), render_scenes(scenes, tmp_path, 2),
                  render_scenes(scenes, str(tmp_path))]
    for images, targets in renderings:
        assert images.shape == (40, 3, 48, 48) and images.dtype == torch.uint8
        for (image, target), drawn, read in zip(scenes, images, targets, strict=True):
            assert torch.equal(image, drawn) and same(target, read)


def test_an_empty_series(tmp_path):
    for folder in (None, tmp_path, tmp_path):
        images, targets = render_scenes(Scenes(SMALL, 0, 0), folder)
        assert images.shape == (0, 3, 48, 48) and targets == []


def test_a_drawn_series_is_not_drawn_again(tmp_path, monkeypatch):
    scenes = Scenes(SMALL, 3, 0)
    images, _ = render_scenes(scenes, tmp_path / "made" / "here")
    monkeypatch.setattr(cache, "write_cache", None)
    again, _ = render_scenes(scenes, tmp_path / "made" / "here")
    assert torch.equal(images, again)
    with pytest.raises(TypeError):
        render_scenes(Scenes(SMALL, 3, 1), tmp_path / "made" / "here")


def faint(rng, strength: float, height: int, width: int):
    """Another texture."""
    return np.zeros((height, width, 1), np.float32)


@pytest.mark.parametrize("what", ["drawing code", "outline", "target"])
def test_a_series_that_would_be_drawn_otherwise_today_is_drawn_again(what, tmp_path, monkeypatch):
    """Also where somebody forgot to raise the version."""
    scenes = Scenes(SMALL, 3, 0)
    render_scenes(scenes, tmp_path, 1)
    change(what, monkeypatch)
    with pytest.warns(UserWarning, match="add 1 to DRAWING"):
        images, targets = render_scenes(scenes, tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 2
    for drawn, read, (image, target) in zip(images, targets, scenes, strict=True):
        assert torch.equal(drawn, image) and same(read, target)
    monkeypatch.setattr(cache, "write_cache", None)
    render_scenes(scenes, tmp_path, 1)  # opened, not drawn, and without a warning


@pytest.mark.parametrize("what", ["version", "Pillow", "NumPy"])
def test_another_version_makes_a_new_cache(what, tmp_path, monkeypatch):
    render_scenes(Scenes(SMALL, 3, 0), tmp_path, 1)
    if what == "version":
        monkeypatch.setattr(cache, "DRAWING", DRAWING + 1)
    else:
        monkeypatch.setattr({"Pillow": PIL, "NumPy": np}[what], "__version__", "0.0")
    render_scenes(Scenes(SMALL, 3, 0), tmp_path, 1)
    assert len(list(tmp_path.glob("*.npy"))) == len(list(tmp_path.glob("*.pt"))) == 2


def test_the_key_holds_whatever_decides_a_series():
    other = {"size": 64, "classes": 5, "min_objects": 2, "max_objects": 9, "min_side": 0.1, "max_side": 0.4,
             "max_overlap": 0.2, "clutter": 5, "contrast": 0.3, "noise": 0.02, "stripes": 0.04}
    assert other.keys() == vars(DEFAULT).keys()
    series = [Scenes(replace(DEFAULT, **{name: value}), 2, 0) for name, value in other.items()]
    series += [Scenes(DEFAULT, 2, 0), Scenes(DEFAULT, 3, 0), Scenes(DEFAULT, 2, 1), Scenes(DEFAULT, 2, 0, masks=True)]
    assert len({series_key(one) for one in series}) == len(series)


@pytest.mark.skipif(PIL.__version__ not in FINGERPRINTS, reason="what this Pillow draws was never written down")
def test_the_pixels_are_those_of_the_written_version():
    """Whoever changes what is drawn adds 1 to DRAWING in chapter 83, and writes the new fingerprint there."""
    assert drawing_fingerprint() == FINGERPRINTS[PIL.__version__]


@pytest.fixture(scope="module")
def drawn_now():
    return drawing_fingerprint()


def change(what, monkeypatch):
    """Make the scenes differ in one respect."""
    name, other = {
        "drawing code": ("texture", faint),
        "target": ("xyxy_to_cxcywh", lambda boxes: boxes),
        "background": ("smooth_field", lambda rng, size, cells: np.zeros((size, size, 3), np.float32)),
        "clutter": ("add_clutter", lambda rng, image, config: None),
        "colour": ("contrasting_colour", lambda rng, under, contrast: rng.random(3, dtype=np.float32)),
        "edges": ("coverage", lambda *window, draw=shapes.coverage: draw(*window, fine=2)),
        "layout": ("overlap", lambda a, b: 0.0),
    }.get(what, (None, None))
    if name:
        monkeypatch.setattr(shapes, name, other)
    else:
        monkeypatch.setitem(shapes.SHAPES, "circle" if what == "outline" else what, [shapes.regular(5)])


@pytest.mark.parametrize(
    "what", ["drawing code", "target", "background", "clutter", "colour", "edges", "layout", *NAMES]
)
def test_the_fingerprint_notices_every_part_of_the_drawing(what, drawn_now, monkeypatch):
    change(what, monkeypatch)
    assert drawing_fingerprint() != drawn_now


def test_who_writes_into_cached_images_does_not_change_the_file(tmp_path):
    images, _ = render_scenes(Scenes(SMALL, 3, 0), tmp_path)
    kept = images.clone()
    images.zero_()
    again, _ = render_scenes(Scenes(SMALL, 3, 0), tmp_path)
    assert torch.equal(again, kept)


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    draw = shapes.make_scene

    def interrupted(config, seed, index):
        if index == 2:
            raise KeyboardInterrupt
        return draw(config, seed, index)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "make_scene", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_scenes(Scenes(SMALL, 4, 0), tmp_path, 1)
        assert not list(tmp_path.iterdir())
    images, _ = render_scenes(Scenes(SMALL, 4, 0), tmp_path, 1)
    assert len(images) == 4


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    pytest.importorskip("resource", reason="file size limits exist on POSIX systems only")
    code = (
        "import resource, sys; from detr_nb.cache import render_scenes; from detr_nb.shapes import *;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "render_scenes(Scenes(SceneConfig(), 4, 0), sys.argv[1], 1)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert run.returncode and "OSError" in run.stderr and not list(tmp_path.iterdir())


def test_a_file_where_the_folder_belongs_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        render_scenes(Scenes(SMALL, 1, 0), tmp_path / "file")


def random_targets(masks):
    """Targets of images of several sizes, one of them empty, with crowds."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for number, (count, size) in enumerate([(3, (20, 30)), (0, (10, 10)), (2, (17, 5))]):
        boxes = torch.rand(count, 4, generator=generator) * 0.4 + 0.3
        target = {"labels": torch.randint(3, (count,), generator=generator), "boxes": boxes, "size": size,
                  "image_id": 10 + number, "crowd": torch.arange(count) % 2 == 1}
        if masks:
            target["masks"] = torch.rand(count, *size, generator=generator) > 0.5
        targets.append(target)
    return targets


def read_back(content, tmp_path, capsys):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    coco = COCO(file)
    capsys.readouterr()
    return coco


@pytest.mark.parametrize("masks", [False, True])
def test_any_targets_come_back_from_coco(masks, tmp_path, capsys):
    targets, ids = random_targets(masks), [90, 1, 18]
    coco = read_back(coco_json(targets, ["a", "b", "c"], ids), tmp_path, capsys)
    assert sorted(coco.getImgIds()) == [10, 11, 12] and 0 not in coco.anns
    assert {entry["id"]: entry["name"] for entry in coco.dataset["categories"]} == {90: "a", 1: "b", 18: "c"}
    for target in targets:
        height, width = target["size"]
        assert (coco.imgs[target["image_id"]]["height"], coco.imgs[target["image_id"]]["width"]) == (height, width)
        found = coco.imgToAnns[target["image_id"]]
        boxes = torch.tensor([entry["bbox"] for entry in found], dtype=torch.float64).reshape(-1, 4)
        scale = torch.tensor([width, height, width, height])
        torch.testing.assert_close(boxes, box_convert(target["boxes"].double() * scale, "cxcywh", "xywh"))
        assert [entry["category_id"] for entry in found] == [ids[label] for label in target["labels"]]
        assert [entry["iscrowd"] for entry in found] == target["crowd"].int().tolist()
        if masks:
            for entry, mask in zip(found, target["masks"].numpy(), strict=True):
                assert (coco.annToMask(entry) == mask).all() and entry["area"] == mask.sum()
                assert coco_mask.area(coco.annToRLE(entry)) == mask.sum()
        else:
            assert all(math.isclose(entry["area"], entry["bbox"][2] * entry["bbox"][3]) for entry in found)


@pytest.mark.parametrize("masks", [False, True])
def test_the_area_of_a_target_is_its_own(masks):
    targets = [target | {"area": 5.0 + torch.arange(len(target["labels"]))} for target in random_targets(masks)]
    content = coco_json(targets, ["a", "b", "c"], [90, 1, 18])
    assert [entry["area"] for entry in content["annotations"]] == [a for t in targets for a in t["area"].tolist()]


def test_perfect_detections_have_a_perfect_score(tmp_path, capsys):
    scenes = Scenes(DEFAULT, 12, 0)
    content = coco_json([target for _, target in scenes], scenes.names, scenes.category_ids)
    coco = read_back(content, tmp_path, capsys)
    detections = [{key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
                  for entry in content["annotations"]]
    judge = COCOeval(coco, coco.loadRes(detections), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    capsys.readouterr()
    assert judge.stats[0] == pytest.approx(1)


def test_images_without_an_id_are_numbered_by_place_and_no_targets_are_legal():
    target = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4), "size": (4, 6)}
    content = coco_json([target, target], ["a"], [1])
    assert [image["id"] for image in content["images"]] == [0, 1] and content["annotations"] == []
    assert coco_json([], [], [])["images"] == []


@pytest.mark.parametrize(
    ("names", "ids", "change", "words"),
    [
        (["a", "b"], [1], {}, "2 names"), (["a", "b"], [1, 1], {}, "one of each"),
        (["a"], [1], {"labels": torch.tensor([1])}, r"targets\[0\] has labels \[1\]"),
        (["a"], [1], {"labels": torch.tensor([-1])}, r"labels \[-1\]"),
    ],
)
def test_what_coco_cannot_hold_is_refused(names, ids, change, words):
    target = {"labels": torch.tensor([0]), "boxes": torch.rand(1, 4), "size": (4, 6)} | change
    with pytest.raises(ValueError, match=words):
        coco_json([target], names, ids)


def test_a_target_without_a_size_is_refused():
    with pytest.raises(ValueError, match=r"targets\[0\] has no size"):
        coco_json([{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}], ["a"], [1])


def test_a_written_series_has_its_pictures(tmp_path, capsys):
    scenes = Scenes(SMALL, 4, 0, masks=True)
    file = write_coco(scenes, tmp_path / "new" / "folder")
    coco = COCO(file)
    capsys.readouterr()
    for index, (image, target) in enumerate(scenes):
        entry = coco.imgs[index]
        picture = np.asarray(Image.open(file.parent / "images" / entry["file_name"]))
        assert (picture == image.permute(1, 2, 0).numpy()).all()
        assert len(coco.imgToAnns[index]) == len(target["labels"])
