"""Metrics against pycocotools used directly, random detections, hand-made errors, and the ways to misuse `evaluate`."""

import contextlib
import io
import json
import math
import os
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from detr_nb.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_nb.data import Preprocess, collate, eval_transform
from detr_nb.errors import (
    ERRORS,
    confusion_matrix,
    error_breakdown,
    error_gains,
    pr_curve,
)
from detr_nb.evaluation import (
    COCO_THRESHOLDS,
    ap_table,
    average_precision,
    coco_evaluate,
    coco_results,
    evaluate,
    evaluation_mode,
    match,
    precision_recall,
    predict,
    relabel,
)
from detr_nb.formats import CocoDataset, VocDataset
from detr_nb.loading import MemoryDataset, Transformed
from detr_nb.notation import Output, Target

NAMES, IDS = ["cat", "dog", "owl"], [17, 3, 90]  # raw ids neither contiguous nor sorted


def target(boxes_xyxy: list, labels: list, side: int = 100, **more) -> Target:
    """A target from corners in pixels."""
    boxes = xyxy_to_cxcywh(torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4) / side)
    return Target(labels=torch.tensor(labels, dtype=torch.int64), boxes=boxes, size=(side, side), **more)


def found(boxes_xyxy: list, labels: list, scores: list) -> dict:
    """Detections from lists."""
    return {
        "boxes": torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def straight(targets: list, detections: list) -> np.ndarray:
    """pycocotools' twelve figures, used as its documentation says: dicts of JSON, `loadRes`, `summarize`."""
    annotations, results = [], []
    for i, (truth, guess) in enumerate(zip(targets, detections, strict=True)):
        height, width = truth["size"]
        boxes = cxcywh_to_xyxy(truth["boxes"].double()) * torch.tensor([width, height, width, height])
        crowd = truth.get("crowd", torch.zeros(len(boxes), dtype=torch.bool)).tolist()
        for (x0, y0, x1, y1), label, c in zip(boxes.tolist(), truth["labels"].tolist(), crowd, strict=True):
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": IDS[label], "iscrowd": int(c),
                                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
        columns = (guess[key].tolist() for key in ("boxes", "labels", "scores"))
        for (x0, y0, x1, y1), label, score in zip(*columns, strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            results.append({"image_id": i, "category_id": IDS[label], "bbox": box, "score": score})
    images = [{"id": i, "height": t["size"][0], "width": t["size"][1]} for i, t in enumerate(targets)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": i} for i in IDS], "info": {}}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(content))
        truth.createIndex()
        job = COCOeval(truth, truth.loadRes(results), "bbox")
        job.evaluate()
        job.accumulate()
        job.summarize()
    return job.stats


def random_set(seed: int, images: int = 5, most: int = 8, crowd: bool = False, grid: int = 8) -> tuple[list, list]:
    """Random images; boxes lie on a grid of a power of two, so that ties of IoU and of score occur and are exact."""
    rng = np.random.default_rng(seed)
    targets, detections = [], []
    for _ in range(images):
        t, n = rng.integers(0, 5), rng.integers(0, most + 1)
        low = rng.integers(0, 5, (t + n, 2))
        boxes = np.concatenate((low, low + rng.integers(1, 5, (t + n, 2))), 1) * grid
        labels = rng.integers(0, 3, t + n)
        extra = {"crowd": torch.from_numpy(rng.random(t) < 0.4)} if crowd else {}
        targets.append(target(boxes[:t].tolist(), labels[:t].tolist(), 16 * grid, **extra))
        detections.append(found(boxes[t:].tolist(), labels[t:].tolist(), (rng.integers(1, 6, n) / 8).tolist()))
    boxes = [[0, 0, 16, 16]]
    return [*targets, target(boxes, [0], 16 * grid)], [*detections, found(boxes, [0], [0.5])]


seeds = st.integers(0, 100_000)


@given(seeds, st.booleans())
@settings(max_examples=40)
def test_ap_from_scratch_equals_pycocotools(seed, crowd):
    targets, detections = random_set(seed, crowd=crowd)
    stats, table = straight(targets, detections), ap_table(targets, detections, 3)
    for ours, official in ((table, stats[0]), (table[:1], stats[1]), (table[5:6], stats[2])):
        assert np.nanmean(ours) == pytest.approx(official, abs=1e-9)


@given(seeds, st.booleans())
@settings(max_examples=25)
def test_coco_evaluate_equals_pycocotools_with_its_sizes_and_limits(seed, crowd):
    targets, detections = random_set(seed, most=60, crowd=crowd, grid=32)
    stats, metrics = straight(targets, detections), coco_evaluate(targets, detections, NAMES, IDS)
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100")
    for name, official in zip(names, stats, strict=False):
        assert metrics[name] == pytest.approx(official if official > -1 else math.nan, abs=1e-12, nan_ok=True)
    table = ap_table(targets, detections, 3)
    assert list(metrics["per_class"]) == NAMES
    assert list(metrics["per_class"].values()) == pytest.approx(table.mean(0).tolist(), abs=1e-9, nan_ok=True)


def official(truth: COCO, results: list) -> COCOeval:
    """pycocotools, run as its documentation says, on results that JSON has carried."""
    with contextlib.redirect_stdout(io.StringIO()):
        job = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), "bbox")
        job.evaluate()
        job.accumulate()
        job.summarize()
    return job


def coco_file(file: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(file)


def perturbed(target: Target, classes: int, rng: np.random.Generator) -> dict:
    """Synthetic detections: the truth moved, renamed, doubled and lost, and some boxes in crowds and on nothing."""
    height, width = target["size"]
    scale = torch.tensor([width, height, width, height])
    boxes, labels = target["boxes"] * scale, target["labels"]
    chosen = torch.from_numpy(rng.random((2, len(labels))) < [[0.85], [0.2]])
    centres, labels = torch.cat([boxes[c] for c in chosen]), torch.cat([labels[c] for c in chosen])
    moved = centres + torch.from_numpy(rng.normal(0, 0.08, centres.shape)).float() * centres[:, [2, 3, 2, 3]]
    crowded = boxes[target.get("crowd", torch.zeros(len(boxes), dtype=torch.bool))] * torch.tensor([1, 1, 0.3, 0.3])
    kinds = target["labels"][target["crowd"]] if "crowd" in target else labels[:0]
    free = torch.from_numpy(rng.uniform(0.1, 0.5, (3, 4))).float() * scale
    renamed = torch.from_numpy(rng.random(len(labels)) < 0.1)
    labels = torch.where(renamed, (labels + 1) % classes, labels)
    labels = torch.cat((labels, kinds, torch.from_numpy(rng.integers(0, classes, 3))))
    boxes = cxcywh_to_xyxy(torch.cat((moved, crowded, free)))
    scores = torch.from_numpy(rng.permutation(1000)[: len(labels)] / 1000 + rng.random() / 1000).float()
    return {"boxes": boxes, "labels": labels, "scores": scores}


def assert_equals_official(metrics: dict, job: COCOeval, dataset) -> None:
    """All figures of `evaluate`, per class too, against pycocotools' own summary and tables."""
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100")
    nan = dict.fromkeys([-1.0], math.nan)
    for name, figure in zip(names, job.stats, strict=False):
        assert metrics[name] == pytest.approx(nan.get(figure, figure), abs=1e-9, nan_ok=True), name
    assert list(metrics["per_class"]) == dataset.names
    for name, raw in zip(dataset.names, dataset.category_ids, strict=True):
        column = job.eval["precision"][:, :, job.params.catIds.index(raw), 0, 2]
        figure = column[column > -1].mean() if (column > -1).any() else math.nan
        assert metrics["per_class"][name] == pytest.approx(figure, abs=1e-9, nan_ok=True), name


def assert_curves_equal_official(targets: list, detections: list, job: COCOeval, dataset, classes: list) -> None:
    """The curve of `pr_curve`, read at COCO's levels of recall, is pycocotools' column."""
    for label in classes:
        precision, recall, _ = pr_curve(targets, detections, label)
        best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        column = job.eval["precision"][0, :, job.params.catIds.index(dataset.category_ids[label]), 0, 2]
        np.testing.assert_allclose(best[np.searchsorted(recall, job.params.recThrs)], column, atol=1e-9)


KEYS = ("boxes", "labels", "scores")


def compare_with_official(dataset, truth: COCO, seed: int) -> int:
    """Synthetic detections of a dataset, by our functions and by pycocotools straight from the file."""
    rng, targets = np.random.default_rng(seed), [dataset[i][1] for i in range(len(dataset))]
    detections = [perturbed(target, len(dataset.names), rng) for target in targets]
    results = [
        {"image_id": target["image_id"], "category_id": dataset.category_ids[label], "score": score,
         "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for target, found in zip(targets, detections, strict=True)
        for (x0, y0, x1, y1), label, score in zip(*(found[k].tolist() for k in KEYS), strict=True)
    ]  # fmt: skip
    job = official(truth, results)
    metrics = coco_evaluate(targets, detections, dataset.names, dataset.category_ids)
    assert 0.1 < metrics["AP"] < 0.9, "neither perfect nor empty, or the comparison would be idle"
    assert_equals_official(metrics, job, dataset)
    seen = torch.cat([t["labels"][~t["crowd"]] for t in targets]).unique().tolist()
    assert_curves_equal_official(targets, detections, job, dataset, seen)
    return sum(int(target["crowd"].sum()) for target in targets)


@pytest.mark.parametrize(("split", "crowds"), [("val2017", 5), ("train2017", 8)])
def test_figures_on_coco_equal_pycocotools_run_directly(split, crowds):
    folder = Path(os.environ.get("DETR_NB_DATA", "")) / "coco_mini"
    if not os.environ.get("DETR_NB_DATA") or not folder.is_dir():
        pytest.skip("DETR_NB_DATA names no folder with coco_mini/")
    file = folder / "annotations" / f"instances_{split}.json"
    assert compare_with_official(CocoDataset(folder / split, file), coco_file(file), crowds) == crowds


def written_coco(folder: Path, seed: int, images: int = 12) -> CocoDataset:
    """A COCO dataset of blank pictures with objects of all sizes, crowds, empty images, and areas of their own."""
    rng, annotations = np.random.default_rng(seed), []
    rows = [{"id": 7 * i, "file_name": f"{i}.png", "height": 240, "width": 320} for i in range(images)]
    for row in rows:
        Image.new("RGB", (320, 240)).save(folder / row["file_name"])
        for _ in range(0 if row["id"] % 4 == 0 else rng.integers(1, 8)):
            width, height = np.exp(rng.uniform(np.log(8), np.log(200), 2))
            x, y = rng.uniform(0, 320 - width), rng.uniform(0, 240 - height)
            annotations.append({
                "id": 100 - len(annotations), "image_id": row["id"], "category_id": IDS[rng.integers(3)],
                "bbox": [x, y, width, height], "area": width * height * rng.uniform(0.3, 1),
                "iscrowd": int(rng.random() < 0.15),
            })  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)]
    (folder / "truth.json").write_text(json.dumps({
        "images": rows, "annotations": annotations, "categories": categories, "info": {},
    }))  # fmt: skip
    return CocoDataset(folder, folder / "truth.json")


@pytest.mark.parametrize("seed", range(4))
def test_figures_on_coco_files_equal_pycocotools_run_directly(tmp_path, seed):
    dataset = written_coco(tmp_path, seed)
    assert compare_with_official(dataset, coco_file(tmp_path / "truth.json"), seed) > 0


class Noisy(nn.Module):
    """Answers with the truth of each image, moved a little, image after image; scores lie close together."""

    def __init__(self, targets: list, classes: int):
        super().__init__()
        self.answers, self.classes, self.rng = iter(targets), classes, np.random.default_rng(0)

    def forward(self, images, pad):
        logits, boxes = torch.zeros(1, len(images), 30, self.classes + 1), torch.full((1, len(images), 30, 4), 0.1)
        for b, target in enumerate(next(self.answers) for _ in images):
            count, (visible_y, visible_x) = len(target["labels"]), ((~pad[b]).any(1).sum(), (~pad[b]).any(0).sum())
            assert visible_x > visible_y, "the pictures are wide, and padding is not picture"
            noise = torch.from_numpy(self.rng.normal(0, 0.02, (count, 4))).float()
            boxes[0, b, :count] = (target["boxes"] + noise).clamp(0.001, 1)
            certainty = torch.from_numpy(self.rng.uniform(2, 6, count)).float()
            logits[0, b, torch.arange(count), target["labels"]] = certainty
        return Output(logits, boxes)


def whole_chain(dataset, truth: COCO) -> None:
    """`evaluate` through a model and a resize, against pycocotools on the results file that `predict` gives."""
    resized, targets = Transformed(dataset, eval_transform(120)), [dataset[i][1] for i in range(len(dataset))]
    rows = predict(Noisy(targets, len(dataset.names)), resized, batch_size=4)
    results = coco_results(rows, dataset.category_ids, [row["image_id"] for row in rows])
    metrics = evaluate(Noisy(targets, len(dataset.names)), resized, batch_size=4)
    assert 0.1 < metrics["AP"] < 0.999
    assert_equals_official(metrics, official(truth, results), dataset)


def test_evaluate_on_coco_equals_pycocotools_on_the_files(tmp_path):
    whole_chain(written_coco(tmp_path, 9), coco_file(tmp_path / "truth.json"))


def test_evaluate_on_data_that_is_not_coco(tmp_path):
    """Three photographs of BCCD; their XML is written as COCO with plain arithmetic."""
    root = Path(__file__).parent / "data" / "bccd"
    dataset, annotations = VocDataset(root, "trainval"), []
    for i, (_, stem) in enumerate(dataset.items):
        for thing in ElementTree.parse(root / "Annotations" / f"{stem}.xml").iter("object"):
            x0, y0, x1, y1 = (float(side.text) for side in thing.find("bndbox"))
            if x1 > x0:
                kind, box = dataset.names.index(thing.findtext("name")), [x0, y0, x1 - x0, y1 - y0]
                row = {"id": len(annotations) + 1, "image_id": i, "category_id": kind, "bbox": box, "iscrowd": 0}
                annotations.append(row | {"area": box[2] * box[3]})
    content = {"info": {}, "images": [{"id": i, "height": 480, "width": 640} for i in range(3)]}
    content |= {"annotations": annotations, "categories": [{"id": i, "name": n} for i, n in enumerate(dataset.names)]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    whole_chain(dataset, coco_file(tmp_path / "truth.json"))


class Brightness(nn.Module):
    """Scores every image by its mean as it arrives."""

    def forward(self, images, pad):
        logits = torch.zeros(1, len(images), 1, 2)
        logits[0, :, 0, 0] = images.mean((1, 2, 3))
        return Output(logits, torch.full((1, len(images), 1, 4), 0.5))


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("rule", "expected"), [(None, 0.235), (Preprocess(mean=(0, 0, 0), std=HALF), 1.004)])
def test_images_arrive_in_the_colours_of_the_model(rule, expected):
    grey = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)  # 0.502 of the range; ImageNet's means are lower
    dataset, model = MemoryDataset(grey, [target([[0, 0, 4, 4]], [0], 8)], ["thing"]), Brightness()
    if rule:
        model.preprocess = rule
    (row,) = predict(model, dataset)
    assert float(torch.logit(row["scores"][0])) == pytest.approx(expected, abs=0.002)
    (told,) = predict(model, dataset, collate=lambda samples: collate(samples, HALF, (0.1, 0.1, 0.1)))
    assert float(torch.logit(told["scores"][0])) == pytest.approx(0.02, abs=0.001)  # an argument wins


def test_masks_change_nothing_in_a_comparison_of_boxes():
    plain = target([[0, 0, 40, 40]], [0])
    masked = {**plain, "masks": torch.zeros(1, 100, 100, dtype=torch.bool)}  # an empty mask has no area
    guess = found([[0, 0, 40, 40]], [0], [0.9])
    figures = [coco_evaluate([truth], [guess], NAMES, IDS) for truth in (plain, masked)]
    assert str(figures[0]) == str(figures[1]) and figures[0]["AP_medium"] == pytest.approx(1)


@given(seeds)
def test_scores_matter_by_order_alone(seed):
    targets, detections = random_set(seed)
    squeezed = [{**d, "scores": d["scores"] ** 3 / 7} for d in detections]
    close = np.testing.assert_allclose
    close(ap_table(targets, squeezed, 3), ap_table(targets, detections, 3))


@given(seeds)
def test_figures_lie_between_0_and_1(seed):
    targets, detections = random_set(seed, most=12)
    metrics = coco_evaluate(targets, detections, NAMES, IDS)
    values = [v for v in [*metrics.values(), *metrics["per_class"].values()] if not isinstance(v, dict)]
    assert all(math.isnan(v) or 0 <= v <= 1 for v in values)


@pytest.mark.parametrize(
    ("overlap", "owner"),
    [
        ([[0.6, 0.7], [0.0, 0.6]], [1, -1]),  # greedy, not Hungarian
        ([[0.5], [0.9]], [0, -1]),  # the score decides, not the overlap; exactly at the threshold counts
        ([[0.6, 0.6]], [1]),  # of equal overlaps the last
        ([[-1.0, 0.8], [0.9, 0.8]], [1, 0]),
    ],
)
def test_matching_by_hand(overlap, owner):
    assert match(np.array(overlap), np.array([0.5])).tolist() == [owner]


@pytest.mark.parametrize(("detections", "targets"), [(0, 3), (3, 0), (0, 0)])
def test_matching_nothing(detections, targets):
    assert (match(np.zeros((detections, targets)), COCO_THRESHOLDS) == -1).all()


def test_average_precision_by_hand():
    precision, recall = precision_recall(np.array([True, False, True, False]), 4)
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3, 1 / 2])
    np.testing.assert_allclose(recall, [1 / 4, 1 / 4, 1 / 2, 1 / 2])
    assert average_precision(precision, recall) == pytest.approx((26 * 1 + 25 * 2 / 3) / 101)
    assert average_precision(precision, recall, points=11) == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)


def test_thresholds_and_limits_by_hand():
    truth = target([[0, 0, 100, 100]], [0])
    metrics = coco_evaluate([truth], [found([[0, 0, 72, 100]], [0], [0.9])], NAMES, IDS)
    assert [metrics[k] for k in ("AP50", "AP75", "AP")] == pytest.approx([1, 0, 0.5])  # 0.50 to 0.70 are reached
    late = found([[90, 90, 99, 99]] * 11 + [[0, 0, 100, 100]], [0] * 12, [0.9] * 11 + [0.1])
    metrics = coco_evaluate([truth], [late], NAMES, IDS)
    assert (metrics["AR_10"], metrics["AR_100"]) == (0, 1) and metrics["AP"] == pytest.approx(1 / 12)


def test_no_detections_at_all_is_zero_and_no_targets_is_nan():
    truth, empty = target([[0, 0, 50, 50]], [0]), found([], [], [])
    nothing = coco_evaluate([truth], [empty], NAMES, IDS)
    assert nothing["AP"] == nothing["AR_100"] == nothing["per_class"]["cat"] == 0
    assert math.isnan(nothing["AP_large"]) and math.isnan(nothing["per_class"]["dog"])
    blank = coco_evaluate([target([], [])], [found([[0, 0, 9, 9]], [0], [0.9])], NAMES, IDS)
    assert math.isnan(blank["AP"]) and math.isnan(blank["AP50"])
    assert math.isnan(coco_evaluate([], [], NAMES, IDS)["AP"])


def test_the_first_object_counts():
    """pycocotools reads the object id 0 as "not matched"."""
    truth = target([[0, 0, 50, 50]], [0])
    assert coco_evaluate([truth], [found([[0, 0, 50, 50]], [0], [0.3])], NAMES, IDS)["AP"] == pytest.approx(1)


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    truth = target([[0, 0, 20, 20], [40, 0, 100, 100]], [0, 0], crowd=torch.tensor([False, True]))
    guess = found([[45, 5, 60, 20], [70, 50, 90, 90], [0, 0, 20, 20]], [0, 0, 0], [0.9, 0.8, 0.7])
    assert coco_evaluate([truth], [guess], NAMES, IDS)["AP"] == pytest.approx(1)
    assert ap_table([truth], [guess], 1).tolist() == [[1.0]] * 10
    assert error_breakdown([truth], [guess]) == {"correct": 1, **dict.fromkeys(ERRORS, 0)}
    assert confusion_matrix([truth], [guess], 1).tolist() == [[1, 0], [0, 0]]
    other = found([[45, 5, 60, 20], [0, 0, 20, 20]], [1, 0], [0.9, 0.8])  # a crowd of cats excuses no dog
    assert error_breakdown([truth], [other])["background"] == 1


def test_given_areas_decide_the_size():
    thin = target([[0, 0, 90, 90]], [0], area=torch.tensor([500.0]))  # a thin thing in a large box
    guess = found([[0, 0, 90, 90]], [0], [0.9])
    metrics = coco_evaluate([thin], [guess], NAMES, IDS)
    assert metrics["AP_small"] == pytest.approx(1) and math.isnan(metrics["AP_medium"])


def test_results_are_in_raw_ids_and_corner_and_size():
    rows = coco_results([found([], [], []), found([[10, 20, 40, 60]], [2], [0.5])], IDS, image_ids=[139, 285])
    row = {"image_id": 285, "category_id": 90, "bbox": [10, 20, 30, 40], "score": 0.5}
    assert json.loads(json.dumps(rows)) == [row]
    assert coco_results([], IDS) == []


def test_nothing_is_printed(capsys):
    coco_evaluate(*random_set(0), NAMES, IDS)
    assert capsys.readouterr().out == ""


TRUTH = target([[0, 0, 20, 20], [50, 0, 90, 40]], [0, 1])
BAD = [
    (found([[0, 0, 20, 20]], [1], [0.9]), "class", 0),
    (found([[8, 0, 28, 20]], [0], [0.9]), "localisation", 0),
    (found([[8, 0, 28, 20]], [2], [0.9]), "both", 1),
    (found([[0, 60, 20, 80]], [0], [0.9]), "background", 1),
    (found([[0, 0, 20, 20], [1, 0, 20, 20]], [0, 0], [0.9, 0.8]), "duplicate", 0),
]


@pytest.mark.parametrize(("guess", "kind", "more_missed"), BAD)
def test_kinds_of_errors_by_hand(guess, kind, more_missed):
    """The dog is never found, so one object is missed in any case; the cat only where no detection is about it."""
    expected = {"correct": int(kind == "duplicate"), **dict.fromkeys(ERRORS, 0), kind: 1, "missed": 1 + more_missed}
    assert error_breakdown([TRUTH], [guess]) == expected
    assert error_breakdown([TRUTH], [guess], min_score=0.95) == {"correct": 0, **dict.fromkeys(ERRORS, 0), "missed": 2}


@pytest.mark.parametrize(("guess", "kind", "more_missed"), BAD)
def test_gains_by_hand(guess, kind, more_missed):
    """Mending makes the cat right where a detection is about it, and the dog where missed objects are found."""
    gains = error_gains([TRUTH], [guess])
    half = kind in ("class", "localisation")
    assert gains == pytest.approx({**dict.fromkeys(ERRORS, 0.0), kind: 0.5 * half, "missed": 0.5 * (1 + more_missed)})


def test_only_one_of_two_mended_detections_counts():
    guess = found([[0, 0, 20, 20], [0, 0, 20, 20]], [1, 2], [0.9, 0.8])
    assert error_breakdown([TRUTH], [guess])["class"] == 2
    assert error_gains([TRUTH], [guess])["class"] == pytest.approx(0.5)
    taken = found([[0, 0, 20, 20], [0, 0, 20, 20]], [0, 1], [0.9, 0.95])  # the cat is found; the false dog goes
    assert error_gains([TRUTH], [taken])["class"] == pytest.approx(0)
    cats = target([[0, 0, 20, 20], [50, 0, 90, 40]], [0, 0])  # one cat is found and also called a dog, one is missed
    twice = found([[0, 0, 20, 20], [0, 0, 20, 20]], [0, 1], [0.9, 0.8])
    assert error_gains([cats], [twice])["class"] == pytest.approx(0)


@given(seeds)
def test_breakdown_accounts_for_everything(seed):
    targets, detections = random_set(seed)
    counts = error_breakdown(targets, detections, min_score=0)
    assert sum(counts.values()) - counts["missed"] == sum(len(d["scores"]) for d in detections)
    table = ap_table(targets, detections, 3, np.array([0.5]))
    assert all(gain >= -1e-9 for gain in error_gains(targets, detections).values())
    assert counts["correct"] > 0 or np.nanmean(table) == 0
    matrix = confusion_matrix(targets, detections, 3, min_score=0)
    assert matrix[:-1].sum() == sum(len(t["labels"]) for t in targets)
    assert matrix[:, :-1].sum() == sum(len(d["scores"]) for d in detections)


def test_confusion_by_hand():
    boxes = [[0, 0, 20, 20], [51, 0, 90, 40], [0, 60, 20, 80], [60, 60, 80, 80]]
    guess = found(boxes, [2, 1, 0, 0], [0.9, 0.8, 0.7, 0.2])
    assert confusion_matrix([TRUTH], [guess], 3).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_pr_curve_spans_images_and_needs_a_target():
    targets = [target([[0, 0, 20, 20]], [0]), target([[0, 0, 20, 20]], [0])]
    guesses = [found([[50, 50, 70, 70], [0, 0, 20, 20]], [0, 0], [0.6, 0.5]), found([[0, 0, 20, 20]], [0], [0.9])]
    precision, recall, scores = pr_curve(targets, guesses, 0)
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3])
    np.testing.assert_allclose(recall, [1 / 2, 1 / 2, 1])
    np.testing.assert_allclose(scores, [0.9, 0.6, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match="no target has the label 1"):
        pr_curve(targets, guesses, 1)


class Scripted(nn.Module):
    """Gives prepared predictions, image after image, and notes how it was called."""

    def __init__(self, boxes: torch.Tensor, labels: torch.Tensor, classes: int):
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.zeros(())), nn.Dropout()
        self.boxes, self.labels, self.classes, self.place, self.calls = boxes, labels, classes, 0, []

    def forward(self, images, pad):
        self.calls.append((len(images), self.training, torch.is_grad_enabled(), images.mean().item()))
        part = slice(self.place, self.place + len(images))
        self.place += len(images)
        logits = 9.0 * torch.nn.functional.one_hot(self.labels[part], self.classes + 1).float()
        return Output(logits[None, :, None], self.boxes[None, part, None])


def wide_dataset(count: int = 5) -> MemoryDataset:
    """Images of 40 rows and 80 columns with one object each."""
    g = torch.Generator().manual_seed(0)
    boxes = 0.2 + 0.3 * torch.rand(count, 1, 4, generator=g)
    targets = [
        Target(labels=torch.tensor([i % 3]), boxes=box, size=(40, 80), image_id=100 + i) for i, box in enumerate(boxes)
    ]
    return MemoryDataset(torch.full((count, 3, 40, 80), 124, dtype=torch.uint8), targets, NAMES, IDS)


def perfect(dataset: MemoryDataset) -> Scripted:
    """A model that knows the dataset."""
    boxes, labels = (torch.cat([t[key] for t in dataset.targets]) for key in ("boxes", "labels"))
    return Scripted(boxes, labels, 3)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_perfect_model_has_ap_1(batch_size):
    data = wide_dataset()
    metrics = evaluate(perfect(data), data, batch_size=batch_size)
    assert [metrics["AP"], metrics["AR_100"], *metrics["per_class"].values()] == pytest.approx([1] * 5)


def test_predictions_are_in_pixels_and_name_their_image():
    data = wide_dataset()
    rows = predict(perfect(data), data, batch_size=2)
    assert [row["image_id"] for row in rows] == [100, 101, 102, 103, 104]
    for row, truth in zip(rows, data.targets, strict=True):
        torch.testing.assert_close(row["boxes"], cxcywh_to_xyxy(truth["boxes"]) * torch.tensor([80, 40, 80, 40]))
        assert row["labels"].tolist() == truth["labels"].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_evaluation_mode_and_keeps_its_own(training):
    data = wide_dataset()
    model = perfect(data).train(training)
    evaluate(model, data, batch_size=2)
    assert [count for count, *_ in model.calls] == [2, 2, 1]
    assert not any(was_training or grad for _, was_training, grad, _ in model.calls)
    assert all(abs(mean) < 0.5 for *_, mean in model.calls), "images were not normalised"
    assert model.training == model.dropout.training == training


def test_mode_comes_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()
    with pytest.raises(RuntimeError, match="on purpose"), evaluation_mode(model):
        raise RuntimeError("on purpose")
    assert model.training and model[0].training and not model[1].training


def test_sizes_come_from_the_image_if_the_target_has_none():
    data = wide_dataset()
    data.targets = [Target(labels=t["labels"], boxes=t["boxes"]) for t in data.targets]
    assert evaluate(perfect(data), data)["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match="the target of image .* has no size"):
        coco_evaluate(data.targets[:1], [found([], [], [])], NAMES, IDS)


def test_a_model_with_raw_ids_is_translated():
    data = wide_dataset()
    raw = torch.tensor(IDS)[torch.cat([t["labels"] for t in data.targets])]
    model = Scripted(torch.cat([t["boxes"] for t in data.targets]), raw, 91)
    with pytest.raises(ValueError, match="labels go from .* map raw category ids"):
        evaluate(model, data)
    model.place, model.category_ids = 0, list(range(91))
    assert evaluate(model, data)["AP"] == pytest.approx(1)


def test_relabel_drops_what_the_dataset_does_not_know():
    guess = found([[0, 0, 1, 1]] * 3, [0, 1, 2], [0.9, 0.8, 0.7])
    kept = relabel(guess, source=[5, 6, 7], goal=[7, 5])
    assert kept["labels"].tolist() == [1, 0] and kept["scores"].tolist() == pytest.approx([0.9, 0.7])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 3}, "keep one order"),
        ({"labels": torch.tensor([3])}, "detection labels go from 3 to 3"),
        ({"labels": torch.tensor([-1])}, "map raw category ids"),
        ({"scores": torch.tensor([math.nan])}, "not finite"),
        ({"boxes": torch.tensor([[0, 0, math.inf, 1]])}, "not finite"),
    ],
)
def test_mismatches_are_named(change, words):
    truth, guess = {**target([[0, 0, 9, 9]], [0]), "image_id": 8}, found([[0, 0, 9, 9]], [0], [0.5])
    with pytest.raises(ValueError, match=words):
        coco_evaluate([truth], [{**guess, **change}], NAMES, IDS)


def test_lengths_and_target_labels_are_checked():
    truth, guess = target([[0, 0, 9, 9]], [0]), found([[0, 0, 9, 9]], [0], [0.5])
    with pytest.raises(ValueError, match="2 targets and 1 detections"):
        coco_evaluate([truth, truth], [guess], NAMES, IDS)
    with pytest.raises(ValueError, match="target labels go from 7 to 7"):
        coco_evaluate([target([[0, 0, 9, 9]], [7])], [guess], NAMES, IDS)


@pytest.mark.slow
def test_conversion_costs_little_beside_pycocotools():
    g = torch.Generator().manual_seed(0)
    targets, detections = [], []
    for _ in range(300):
        boxes = 0.2 + 0.4 * torch.rand(6, 4, generator=g)
        targets.append(Target(labels=torch.randint(3, (6,), generator=g), boxes=boxes, size=(480, 640)))
        near = cxcywh_to_xyxy(boxes.repeat(17, 1)[:100] + 0.03 * torch.randn(100, 4, generator=g)) * 600
        guess = {"labels": torch.randint(3, (100,), generator=g), "scores": torch.rand(100, generator=g), "boxes": near}
        detections.append(guess)
    works = {"ours": lambda: coco_evaluate(targets, detections, NAMES, IDS),
             "straight": lambda: straight(targets, detections)}
    best = dict.fromkeys(works, math.inf)
    for _ in range(4):  # in turn, and the best of each counts: other programs only make it slower
        for name, work in works.items():
            start = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - start)
    assert best["ours"] < 1.5 * best["straight"], best
