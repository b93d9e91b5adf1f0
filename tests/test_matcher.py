"""The matcher against brute force, the authors' assignments and torchvision, and the traps around it."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official import DATA, Reference
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from detr_nb.boxes import cxcywh_to_xyxy
from detr_nb.matcher import (
    HungarianMatcher,
    assign,
    class_cost,
    explain_bad_cost,
    pad_targets,
)
from detr_nb.model import PlaneBoxes
from detr_nb.notation import Output, Target, toy_output, toy_targets

counts = st.lists(st.integers(0, 4), min_size=1, max_size=4)
seeds = st.integers(0, 2**31 - 1)


def random_case(
    seed: int, layers: int, queries: int, objects: list[int], classes: int = 5
) -> tuple[Output, list[Target]]:
    """Random predictions and as many objects an image as asked for."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, 4, generator=generator) * 0.6 + 0.1

    logits = 3 * torch.randn(layers, len(objects), queries, classes + 1, generator=generator)
    targets = [Target(labels=torch.randint(classes, (n,), generator=generator), boxes=boxes(n)) for n in objects]
    return Output(logits, boxes(layers, len(objects), queries)), targets


def pair_costs(out: Output, target: Target, layer: int, image: int, weights=(1, 5, 2)) -> np.ndarray:
    """The cost matrix of one image, cell by cell."""
    table = np.zeros((out.boxes.shape[2], len(target["labels"])))
    for q, t in np.ndindex(*table.shape):
        logits = out.logits[layer, image, q].double()
        p, b = out.boxes[layer, image, q], target["boxes"][t]
        overlap = generalized_box_iou(cxcywh_to_xyxy(p[None]), cxcywh_to_xyxy(b[None])).item()
        probability = (logits.exp() / logits.exp().sum())[target["labels"][t]].item()
        table[q, t] = -weights[0] * probability + weights[1] * (p - b).abs().sum().item() - weights[2] * overlap
    return table


def cheapest(cost: np.ndarray) -> float:
    """The smallest total of a one-to-one assignment, by trying all."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    rows, columns = cost.shape
    return min(cost[list(chosen), range(columns)].sum() for chosen in permutations(range(rows), columns))


@given(seed=seeds, queries=st.integers(1, 5), objects=counts)
def test_no_assignment_is_cheaper(seed, queries, objects):
    out, targets = random_case(seed, 2, queries, objects)
    for i, layer in enumerate(HungarianMatcher()(out, targets)):
        assert len(layer) == len(targets)
        for b, (query, target) in enumerate(layer):
            cost = pair_costs(out, targets[b], i, b)
            assert len(query) == len(target) == min(cost.shape)
            assert len(set(query.tolist())) == len(query) and len(set(target.tolist())) == len(target)
            assert query.tolist() == sorted(query.tolist())
            assert math.isclose(cost[query, target].sum(), cheapest(cost), abs_tol=1e-4)


@given(seed=seeds, objects=counts, weights=st.tuples(*[st.floats(0.1, 10)] * 3))
def test_the_cost_matrix_is_that_of_plain_loops(seed, objects, weights):
    out, targets = random_case(seed, 2, 3, objects)
    cost = HungarianMatcher(*weights).cost(out, pad_targets(targets, out.boxes)).numpy()
    for i in range(2):
        for b, n in enumerate(objects):
            np.testing.assert_allclose(cost[i, b, :, :n], pair_costs(out, targets[b], i, b, weights), atol=2e-4)


@given(seed=seeds, objects=counts, company=st.integers(0, 12))
def test_an_image_is_matched_alone_as_in_any_company(seed, objects, company):
    """Padding to the longest target list of the batch must not leak into the others."""
    out, targets = random_case(seed, 2, 6, [*objects, company])
    together = HungarianMatcher()(out, targets)
    for b in range(len(objects)):
        alone = HungarianMatcher()(out.apply(lambda tensor, b=b: tensor[:, b, None]), targets[b : b + 1])
        for i in range(2):
            assert all(torch.equal(x, y) for x, y in zip(together[i][b], alone[i][0], strict=True))


@given(seed=seeds)
def test_shuffled_targets_and_queries_give_the_same_pairs(seed):
    out, (target,) = random_case(seed, 1, 6, [4])
    generator = torch.Generator().manual_seed(seed)
    tp, qp = torch.randperm(4, generator=generator), torch.randperm(6, generator=generator)
    shuffled = HungarianMatcher()(
        out.queries(qp), [Target(labels=target["labels"][tp], boxes=target["boxes"][tp])]
    )
    ((q, t),), ((q2, t2),) = HungarianMatcher()(out, [target])[0], shuffled[0]
    assert dict(zip(t.tolist(), q.tolist(), strict=True)) == dict(zip(tp[t2].tolist(), qp[q2].tolist(), strict=True))


@pytest.mark.parametrize("case", ["a", "none", "more"])
def test_pairs_are_the_official_ones(case):
    reference = Official(case)
    ours = HungarianMatcher()(reference.out, reference.targets(f"{case}/"))
    theirs = reference.matches(f"{case}/")
    assert len(ours) == len(theirs) == 3
    for layer, expected in zip(ours, theirs, strict=True):
        for pair, indices in zip(layer, expected, strict=True):
            assert torch.equal(torch.stack(pair), indices)


class Official(Reference):
    """A case of the reference file without a model."""

    def __init__(self, case: str):
        self.values = np.load(DATA / "criterion.npz")
        self.out = Output(self[f"{case}/logits"], self[f"{case}/boxes"])


@given(seed=seeds, q=st.integers(0, 6), t=st.integers(0, 6))
def test_assign_is_scipy_s_rule_in_torch_s_integers(seed, q, t):
    cost = np.random.default_rng(seed).random((q, t), np.float32)
    rows, columns = assign(cost)
    assert rows.dtype == columns.dtype == torch.int64
    assert np.array_equal(np.stack((rows, columns)), np.stack(linear_sum_assignment(cost)))


def test_terms_by_hand():
    out, padded = toy_output(), pad_targets(toy_targets(), toy_output().boxes)
    e = math.exp
    assert math.isclose(class_cost(out, padded)[1, 0, 2, 0], -e(2.2) / (e(2.2) + e(0.2) + e(0.3)), rel_tol=1e-5)
    far = PlaneBoxes().costs(out.boxes, padded.boxes)
    assert math.isclose(far["bbox"][1, 0, 2, 0], 0.02 + 0.02 + 0.02 + 0.04, rel_tol=1e-4)
    # prediction 0.13..0.41 x 0.24..0.60, target 0.10..0.40 x 0.20..0.60: the hull is 0.31 x 0.40
    shared, hull = 0.27 * 0.36, 0.31 * 0.40
    union = 0.28 * 0.36 + 0.30 * 0.40 - shared
    assert math.isclose(far["giou"][1, 0, 2, 0], -(shared / union - (hull - union) / hull), rel_tol=1e-4)


def test_no_gradient_flows_through_matching():
    out, targets = random_case(0, 1, 4, [2])
    out = Output(out.logits.requires_grad_(), out.boxes.requires_grad_())
    assert not HungarianMatcher().cost(out, pad_targets(targets, out.boxes)).requires_grad


def test_half_precision_predictions_are_matched_in_single_precision():
    """In bfloat16 two boxes 0.002 apart are one; the targets must not be rounded to that."""
    out, targets = random_case(1, 1, 2, [2])
    boxes = torch.tensor([[0.5000, 0.5, 0.2, 0.2], [0.5010, 0.5, 0.2, 0.2]])
    padded = pad_targets([Target(labels=targets[0]["labels"], boxes=boxes)], out.boxes.bfloat16())
    assert padded.boxes.dtype == torch.float32 and torch.equal(padded.boxes[0], boxes)
    half = Output(out.logits.bfloat16(), out.boxes.bfloat16())
    same = Output(half.logits.float(), half.boxes.float())
    for a, b in zip(HungarianMatcher()(half, targets)[0][0], HungarianMatcher()(same, targets)[0][0], strict=True):
        assert torch.equal(a, b)


def test_a_weight_of_zero_switches_a_term_off():
    out, targets = random_case(2, 1, 5, [3])
    padded = pad_targets(targets, out.boxes)
    out.boxes[:] = float("nan")  # a term that is off is not even computed
    torch.testing.assert_close(HungarianMatcher(2, 0, 0).cost(out, padded), 2 * class_cost(out, padded))


def test_narrow_labels_are_taken_as_ids():
    out, (target,) = random_case(3, 1, 5, [3])
    narrow = Target(labels=target["labels"].to(torch.int32), boxes=target["boxes"])
    for a, b in zip(HungarianMatcher()(out, [target])[0][0], HungarianMatcher()(out, [narrow])[0][0], strict=True):
        assert torch.equal(a, b)


def test_all_weights_zero_are_refused():
    with pytest.raises(ValueError, match="all three cost weights are 0"):
        HungarianMatcher(0, 0.0, 0)


@pytest.mark.parametrize("name", ["logits", "boxes"])
@pytest.mark.parametrize("objects", [[2, 1], [2, 0], [0, 0]], ids=["all", "some", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_named(name, objects, value):
    """Also in an image without targets, and in a batch without any, where no cost shows it."""
    out, targets = random_case(4, 3, 4, objects)
    getattr(out, name)[1, 1, 2, 0] = value
    with pytest.raises(ValueError, match=rf"predicted {name} are not finite \(first at decoder layer 1, image 1"):
        HungarianMatcher()(out, targets)


@pytest.mark.parametrize("label", [-1, 5, 90])
def test_labels_out_of_range_are_named(label):
    out, targets = random_case(5, 1, 4, [1, 2])
    targets[1]["labels"][1] = label
    with pytest.raises(ValueError, match=f"image number 1 of the batch: label {label} of target 1 is outside 0..4"):
        HungarianMatcher()(out, targets)


@pytest.mark.parametrize("box", [[0.5, 0.5, -0.1, 0.1], [math.nan, 0.5, 0.1, 0.1], [0.5, 0.5, 0.1, math.inf]])
def test_boxes_that_are_no_boxes_are_named(box):
    out, targets = random_case(6, 1, 4, [1, 2])
    targets[1] = {**targets[1], "image_id": 4711}
    targets[1]["boxes"][0] = torch.tensor(box)
    with pytest.raises(ValueError, match="image 4711: box .* of target 0 is not a finite cxcywh box"):
        HungarianMatcher()(out, targets)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6])
def test_boxes_without_area_are_legal(size):
    out, targets = random_case(7, 1, 4, [2])
    targets[0]["boxes"][0, 2:] = size
    ((query, _),) = HungarianMatcher()(out, targets)[0]
    assert len(query) == 2


def test_the_culprit_is_a_prediction_before_it_is_a_target():
    out, targets = random_case(8, 1, 4, [1])
    targets[0]["labels"][0] = 99
    out.boxes[0, 0, 0, 0] = float("nan")
    assert "predicted boxes" in explain_bad_cost(out, targets, 5)


@pytest.mark.parametrize(("labels", "boxes"), [
    (torch.tensor([]), torch.tensor([])),
    (torch.tensor([0, 1]), torch.rand(1, 4)),
    (torch.tensor([0, 1]), torch.rand(2, 5)),
    (torch.tensor([[0]]), torch.rand(1, 4)),
    (torch.tensor([0.0]), torch.rand(1, 4)),
], ids=["bare empty list", "a box too few", "five numbers", "labels in two axes", "float labels"])
def test_targets_that_do_not_fit_together_are_named(labels, boxes):
    """Silently dropping a box because another image of the batch is longer would be worse than an error."""
    out, targets = random_case(9, 1, 4, [3])
    with pytest.raises(ValueError, match="image number 1 of the batch: labels must be integers"):
        pad_targets([targets[0], {"labels": labels, "boxes": boxes}], out.boxes)


def test_a_target_too_few_or_too_many_is_refused():
    out, targets = random_case(10, 1, 4, [1, 1])
    for wrong in (targets[:1], targets * 2):
        with pytest.raises(ValueError, match="predictions of 2 images need as many targets"):
            HungarianMatcher()(out, wrong)
