"""The criterion against the authors' own values, against Hugging Face's DETR, and against torch term by term."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from detr_nb.boxes import cxcywh_to_xyxy
from detr_nb.losses import (
    SetCriterion,
    SoftmaxClasses,
    cardinality_error,
    class_error,
    classification_loss,
    set_losses,
)
from detr_nb.matcher import HungarianMatcher, pad_targets
from detr_nb.notation import Output, Target, toy_output, toy_targets

close = torch.testing.assert_close
CASES = ("a", "none", "more")  # mixed with an empty image, no targets at all, more targets than queries
CLASSES = 20


def reference(case: str) -> tuple[Output, list[Target], dict[str, float]]:
    """Predictions, targets and the official losses of one case."""
    values = np.load(Path(__file__).parent / "data" / "criterion.npz")
    tensor = {k.removeprefix(f"{case}/"): torch.from_numpy(values[k]) for k in values.files if k.startswith(f"{case}/")}
    rows = [(tensor[f"target{i}/labels"], tensor[f"target{i}/boxes"]) for i in range(len(tensor["counts"]))]
    targets = [Target(labels=labels, boxes=boxes) for labels, boxes in rows]
    prefix = "nomask_loss/"
    losses = {k.removeprefix(prefix): v for k, v in tensor.items() if k.startswith(prefix)}
    return Output(tensor["logits"], tensor["boxes"]), targets, losses


def random_case(seed: int, layers: int = 3, queries: int = 8, counts: tuple[int, ...] = (0, 3, 11)) -> tuple:
    """A random output and random targets; the last image has more targets than queries."""
    g = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> torch.Tensor:
        return 0.05 + 0.45 * torch.rand(*shape, 4, generator=g)

    logits = torch.randn(layers, len(counts), queries, CLASSES + 1, generator=g)
    out = Output(logits, boxes(layers, len(counts), queries))
    targets = [Target(labels=torch.randint(CLASSES, (n,), generator=g), boxes=boxes(n)) for n in counts]
    return out, targets


seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("case", CASES)
def test_official_names_and_values(case):
    out, targets, official = reference(case)
    losses = SetCriterion(CLASSES)(out, targets)
    assert losses.keys() == official.keys()
    for name, value in official.items():
        close(losses[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_finite_and_reach_every_query(case):
    out, targets, _ = reference(case)
    logits, boxes = out.logits.requires_grad_(), out.boxes.requires_grad_()
    criterion = SetCriterion(CLASSES)
    criterion.total(criterion(Output(logits, boxes), targets)).backward()
    assert logits.grad.isfinite().all() and boxes.grad.isfinite().all()
    assert (logits.grad.abs().sum(-1) > 0).all()
    moved = (boxes.grad != 0).any(-1).sum((1, 2))
    assert moved.tolist() == [sum(min(len(t["labels"]), boxes.shape[2]) for t in targets)] * len(boxes)


@pytest.mark.parametrize("case", CASES)
def test_hugging_face_agrees(case):
    from transformers.loss import loss_for_object_detection as module

    out, targets, _ = reference(case)
    config = SimpleNamespace(
        class_cost=1, bbox_cost=5, giou_cost=2, num_labels=CLASSES, eos_coefficient=0.1, auxiliary_loss=True,
        bbox_loss_coefficient=5, giou_loss_coefficient=2, decoder_layers=len(out.logits),
    )
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    total, theirs, _ = module.ForObjectDetectionLoss(
        out.logits[-1], labels, torch.device("cpu"), out.boxes[-1], config, out.logits, out.boxes
    )
    criterion = SetCriterion(CLASSES)
    ours = criterion(out, targets)
    assert ours.keys() - theirs.keys() == {"class_error"}
    for name in theirs:
        close(ours[name], torch.as_tensor(theirs[name]), atol=1e-5, rtol=1e-5)
    close(criterion.total(ours), total, atol=1e-4, rtol=1e-5)


@given(seeds, st.floats(0.01, 3))
def test_classification_is_torchs_weighted_mean(seed, no_object_weight):
    out, _ = random_case(seed)
    classes = torch.randint(CLASSES + 1, out.logits.shape[:-1], generator=torch.Generator().manual_seed(seed))
    weight = torch.ones(CLASSES + 1)
    weight[-1] = no_object_weight
    ours = classification_loss(out.logits, classes, no_object_weight)
    for i, value in enumerate(ours):
        close(value, F.cross_entropy(out.logits[i].flatten(0, 1), classes[i].flatten(), weight))


@given(seeds)
def test_box_terms_are_torchvisions_at_every_layer(seed):
    out, targets = random_case(seed)
    criterion = SetCriterion(CLASSES)
    losses, count = criterion(out, targets), sum(len(t["labels"]) for t in targets)
    for i, layer in enumerate(HungarianMatcher()(out, targets)):
        suffix = "" if i == len(out.logits) - 1 else f"_{i}"
        predicted = torch.cat([out.boxes[i, b, q] for b, (q, _) in enumerate(layer)])
        truth = torch.cat([targets[b]["boxes"][t] for b, (_, t) in enumerate(layer)])
        giou = generalized_box_iou_loss(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(truth), "sum")
        close(losses[f"loss_bbox{suffix}"], F.l1_loss(predicted, truth, reduction="sum") / count)
        close(losses[f"loss_giou{suffix}"], giou / count)


@given(seeds)
def test_a_layer_is_judged_as_if_it_were_alone(seed):
    out, targets = random_case(seed)
    criterion = SetCriterion(CLASSES)
    together = criterion(out, targets)
    for i in range(len(out.logits)):
        alone = criterion(Output(out.logits[i : i + 1], out.boxes[i : i + 1]), targets)
        suffix = "" if i == len(out.logits) - 1 else f"_{i}"
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            close(together[name + suffix], alone[name])
    close(together["class_error"], alone["class_error"])


@given(seeds)
def test_order_does_not_matter(seed):
    out, targets = random_case(seed)
    g = torch.Generator().manual_seed(seed)
    queries, images = torch.randperm(out.boxes.shape[2], generator=g), torch.randperm(len(targets), generator=g)
    turned = out.apply(lambda part: part[:, images]).queries(queries)
    mixed = []
    for b in images.tolist():
        order = torch.randperm(len(targets[b]["labels"]), generator=g)
        mixed.append(Target(labels=targets[b]["labels"][order], boxes=targets[b]["boxes"][order]))
    criterion = SetCriterion(CLASSES)
    before, after = criterion(out, targets), criterion(turned, mixed)
    for name, value in before.items():
        close(after[name], value)


def test_perfect_predictions_cost_nothing():
    targets = toy_targets()
    logits = torch.full((1, 1, 3, 3), -20.0)
    logits[0, 0, [0, 1, 2], [0, 1, 2]] = 20.0
    boxes = torch.cat((targets[0]["boxes"], torch.full((1, 4), 0.5)))[None, None]
    criterion = SetCriterion(2)
    losses = criterion(Output(logits, boxes), targets)
    close(criterion.total(losses), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert losses["class_error"] == losses["cardinality_error"] == 0


def test_total_leaves_out_what_is_only_watched():
    out, targets = random_case(0)
    criterion = SetCriterion(CLASSES, weight_ce=2, weight_bbox=0.5, weight_giou=3, dec_layers=3)
    losses = criterion(out, targets)
    assert criterion.weights.keys() == {k for k in losses if k.startswith("loss")}
    expected = sum(criterion.weights[name] * losses[name] for name in criterion.weights)
    close(criterion.total(losses), expected)
    losses["cardinality_error"] = losses["class_error"] = torch.tensor(1e6)
    close(criterion.total(losses), expected)


def test_total_needs_no_agreement_on_the_number_of_layers():
    out, targets = random_case(0, layers=3)
    close(
        SetCriterion(CLASSES, dec_layers=1).total(SetCriterion(CLASSES)(out, targets)),
        SetCriterion(CLASSES, dec_layers=9).total(SetCriterion(CLASSES)(out, targets)),
    )


def test_cost_weights_decide_and_loss_weights_do_not():
    out, targets = random_case(1)
    plain = SetCriterion(CLASSES)(out, targets)
    heavy = SetCriterion(CLASSES, weight_bbox=50)(out, targets)
    by_class = SetCriterion(CLASSES, cost_bbox=0, cost_giou=0)(out, targets)
    close(heavy["loss_bbox"], plain["loss_bbox"])
    assert by_class["loss_bbox"] > plain["loss_bbox"] and by_class["loss_ce"] < plain["loss_ce"]


def test_watched_figures_by_hand():
    logits = torch.eye(3)[[0, 1, 2, 2]]  # class 0, class 1, no-object twice
    assert class_error(logits[:1], torch.tensor([0])) == 0 and class_error(logits[:1], torch.tensor([1])) == 100
    assert class_error(logits[:3], torch.tensor([0, 0, 1])).item() == pytest.approx(200 / 3, abs=1e-4)
    assert cardinality_error(SoftmaxClasses().claimed(logits[None, None].expand(1, 2, 4, 3)), [2, 5]).tolist() == [1.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_judged_in_full(dtype):
    out, targets = random_case(2)
    half = Output(out.logits.to(dtype), out.boxes.to(dtype))
    full = Output(half.logits.float(), half.boxes.float())
    criterion = SetCriterion(CLASSES)
    short = [Target(labels=t["labels"], boxes=t["boxes"].to(dtype).float()) for t in targets]
    for name, value in criterion(full, short).items():
        close(criterion(half, short)[name], value)


def test_nothing_learns_through_the_matcher():
    out, targets = random_case(3)
    boxes = out.boxes.clone().requires_grad_()
    fixed = HungarianMatcher()(out, targets)
    losses = set_losses(Output(out.logits, boxes), pad_targets(targets, boxes), fixed)
    (by_hand,) = torch.autograd.grad(SetCriterion(CLASSES).total(losses), boxes)
    criterion = SetCriterion(CLASSES)
    (whole,) = torch.autograd.grad(criterion.total(criterion(Output(out.logits, boxes), targets)), boxes)
    close(whole, by_hand)


@pytest.mark.parametrize("count", [1, 91])
def test_other_numbers_of_classes_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} classes .* 3 columns.*same num_classes"):
        SetCriterion(count)(toy_output(), toy_targets())


@pytest.mark.parametrize("label", [2, 90, -1])
def test_labels_out_of_range_are_named(label):
    target = toy_targets()[0]
    target["labels"] = torch.tensor([0, label])
    with pytest.raises(ValueError, match=f"image 7: label {label} of target 1"):
        SetCriterion(2)(toy_output(), [target])


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_predictions_are_named(part, value):
    tensors = [tensor.clone() for tensor in toy_output()[:2]]
    tensors[part][1, 0, 2, 0] = value
    with pytest.raises(ValueError, match="predicted (logits|boxes) are not finite .*layer 1, image 0"):
        SetCriterion(2)(Output(*tensors), toy_targets())
