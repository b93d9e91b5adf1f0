"""Box algebra: against counting cells, torchvision and the official outputs, and as properties."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.testing import assert_close
from torchvision import ops

from detr_nb.boxes import (
    box_area,
    cxcywh_to_xyxy,
    giou,
    hull_area,
    intersection_and_union,
    iou,
    masks_to_boxes,
    pairwise_giou,
    pairwise_iou,
    scale_boxes,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)

SIDE = 12  # of the grid on which areas are counted
NUMBERS = st.floats(0, 1, width=32)


@st.composite
def whole_boxes(draw, n: int = 3, least: int = 0) -> torch.Tensor:
    """Corners on whole numbers, so that areas can be counted; sides of at least `least`."""
    rows = []
    for _ in range(n):
        x0, y0 = draw(st.integers(0, SIDE - least)), draw(st.integers(0, SIDE - least))
        rows.append([x0, y0, draw(st.integers(x0 + least, SIDE)), draw(st.integers(y0 + least, SIDE))])
    return torch.tensor(rows, dtype=torch.float64)


@st.composite
def boxes(draw, n: int = 3, least: float = 0.01) -> torch.Tensor:
    """Normalised cxcywh in double precision, sides of at least `least`."""
    sizes = st.floats(least, 1)
    rows = [[draw(NUMBERS), draw(NUMBERS), draw(sizes), draw(sizes)] for _ in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


def cells(box_xyxy: torch.Tensor) -> np.ndarray:
    x0, y0, x1, y1 = box_xyxy.int().tolist()
    grid = np.zeros((SIDE, SIDE), dtype=bool)
    grid[y0:y1, x0:x1] = True
    return grid


def counted(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """IoU and GIoU of two boxes with area, by counting cells."""
    first, second = cells(a), cells(b)
    union = int((first | second).sum())
    ys, xs = (first | second).nonzero()
    hull = (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
    overlap = int((first & second).sum()) / union
    return overlap, overlap - (hull - union) / hull


# --- formats ------------------------------------------------------------------------------------------------------
@given(boxes())
def test_conversions_go_there_and_back_and_agree_with_torchvision(b):
    corners = cxcywh_to_xyxy(b)
    assert_close(xyxy_to_cxcywh(corners), b)
    assert_close(xywh_to_xyxy(xyxy_to_xywh(corners)), corners)
    assert_close(corners, ops.box_convert(b, "cxcywh", "xyxy"))
    assert_close(xyxy_to_xywh(corners), ops.box_convert(b, "cxcywh", "xywh"))
    assert_close(box_area(corners), b[:, 2] * b[:, 3])


@given(boxes(), st.integers(1, 2000), st.integers(1, 2000))
def test_scaling_works_in_every_format_and_puts_height_first(b, height, width):
    scaled = scale_boxes(b, height, width)
    assert_close(scaled[:, 0], b[:, 0] * width)
    assert_close(scaled[:, 3], b[:, 3] * height)
    assert_close(cxcywh_to_xyxy(scaled), scale_boxes(cxcywh_to_xyxy(b), height, width))
    assert_close(scale_boxes(scaled, 1 / height, 1 / width), b)


def test_scaling_keeps_dtype():
    assert scale_boxes(torch.rand(2, 4).half(), 480, 640.0).dtype == torch.float16


# --- overlap ------------------------------------------------------------------------------------------------------
@given(whole_boxes(least=1), whole_boxes(least=1))
def test_overlap_equals_counting_cells(a, b):
    expected = torch.tensor([counted(x, y) for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    assert_close(torch.stack((iou(a, b), giou(a, b)), -1), expected)


@given(whole_boxes(), whole_boxes())
def test_areas_equal_counting_cells_also_without_area(a, b):
    for first, second in zip(a, b, strict=True):
        shared, union = intersection_and_union(first, second)
        assert shared == (cells(first) & cells(second)).sum()
        assert union == (cells(first) | cells(second)).sum()
        assert shared <= union <= hull_area(first, second)


@given(boxes(4), boxes(5))
def test_pairs_agree_with_torchvision(a, b):
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    assert_close(pairwise_iou(a, b), ops.box_iou(a, b), atol=1e-9, rtol=1e-9)
    assert_close(pairwise_giou(a, b), ops.generalized_box_iou(a, b), atol=1e-9, rtol=1e-9)
    assert_close(giou(a, b[:4]), pairwise_giou(a, b[:4]).diagonal())


@given(boxes(least=0.2), boxes(least=0.2))  # torchvision adds 1e-7 to the areas: negligible for large boxes only
def test_the_loss_agrees_with_torchvision(a, b):
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    assert_close(1 - giou(a, b), ops.generalized_box_iou_loss(a, b), atol=1e-5, rtol=0)


@given(boxes(), boxes(), st.floats(-5, 5), st.floats(0.01, 1000))
def test_overlap_is_symmetric_bounded_and_knows_no_place_or_unit(a, b, shift, factor):
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    for measure, least in ((iou, 0), (giou, -1)):
        value = measure(a, b)
        assert_close(value, measure(b, a))
        assert (value >= least).all() and (value <= 1 + 1e-12).all()
        assert_close(value, measure(a * factor, b * factor), atol=1e-9, rtol=1e-9)
        assert_close(value, measure(a + shift, b + shift), atol=1e-9, rtol=1e-9)
        assert_close(measure(a, a), torch.ones_like(value))
    assert (giou(a, b) <= iou(a, b) + 1e-12).all()


@given(boxes(1, least=0.1), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_box_inside_another_has_the_ratio_of_areas(outer, w, h, x, y):
    low, size = cxcywh_to_xyxy(outer)[:, :2], outer[:, 2:]
    inner_size = size * torch.tensor([w, h])
    inner_low = low + (size - inner_size) * torch.tensor([x, y])
    inner, outer = torch.cat((inner_low, inner_low + inner_size), -1), cxcywh_to_xyxy(outer)
    assert_close(iou(inner, outer), torch.tensor([w * h], dtype=torch.float64), atol=1e-7, rtol=1e-7)
    assert_close(giou(inner, outer), iou(inner, outer))


def test_further_away_is_worse_only_for_giou():
    near, far, target = torch.tensor([[2.0, 0, 3, 1], [9.0, 0, 10, 1], [0.0, 0, 1, 1]])
    assert iou(near, target) == iou(far, target) == 0
    assert -1 < giou(far, target) < giou(near, target) < 0


# --- gradients and odd boxes --------------------------------------------------------------------------------------
@given(boxes(2, least=0.05), boxes(2, least=0.05))
def test_gradients_equal_finite_differences(a, b):
    corners = torch.cat((cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)))
    for axis in (0, 1):  # at a tie of two edges there is a kink and no derivative
        assume(corners[:, axis::2].flatten().sort().values.diff().min() > 1e-3)
    corners = corners.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pairwise_iou(x[:2], x[2:]), corners)
    assert torch.autograd.gradcheck(lambda x: pairwise_giou(x[:2], x[2:]), corners)


DEGENERATE = st.sampled_from([0.0, 1e-30, 1e-8, 0.25, 0.5, 1.0])


@given(st.lists(st.tuples(DEGENERATE, DEGENERATE, DEGENERATE, DEGENERATE), min_size=2, max_size=5))
def test_boxes_without_area_give_finite_values_and_gradients(rows):
    b = torch.tensor(rows, requires_grad=True)  # cxcywh in float32, sides may be 0
    for measure in (pairwise_iou, pairwise_giou):
        values = measure(cxcywh_to_xyxy(b), cxcywh_to_xyxy(b))
        assert values.isfinite().all() and values.abs().max() <= 1 + 1e-5
        (gradient,) = torch.autograd.grad(values.sum(), b)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("side", [1e-5, 1e-4, 1.0, 1e5])
def test_the_guard_changes_no_box_of_reasonable_size(side):
    box = torch.tensor([0.0, 0.0, side, side])
    assert_close(iou(box, box), torch.tensor(1.0))
    assert_close(giou(box, box), torch.tensor(1.0))


def test_nan_is_not_hidden():
    box = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    for measure in (iou, giou):
        assert measure(box * float("nan"), box).isnan().all()
        assert measure(box, box * float("nan")).isnan().all()


# --- shapes -------------------------------------------------------------------------------------------------------
def test_leading_axes_broadcast():
    a, b = torch.rand(3, 1, 5, 4), torch.rand(2, 7, 4)
    table = pairwise_giou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))
    assert table.shape == (3, 2, 5, 7)
    one = ops.generalized_box_iou(cxcywh_to_xyxy(a[2, 0]), cxcywh_to_xyxy(b[1]))
    assert_close(table[2, 1], one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("q", "t"), [(0, 3), (3, 0), (0, 0)])
def test_no_boxes_are_legal(q, t):
    assert pairwise_iou(torch.rand(q, 4), torch.rand(t, 4)).shape == (q, t)
    assert pairwise_giou(torch.rand(2, q, 4), torch.rand(2, t, 4)).shape == (2, q, t)
    assert cxcywh_to_xyxy(torch.rand(0, 4)).shape == (0, 4)


def test_everything_is_made_on_the_device_of_the_boxes():
    b = torch.empty(3, 4, device="meta")  # fails if any part is made elsewhere
    assert pairwise_giou(cxcywh_to_xyxy(b), scale_boxes(b, 480, 640)).device.type == "meta"


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        iou(torch.rand(3, 4), torch.rand(2, 4))
    with pytest.raises(TypeCheckError):
        cxcywh_to_xyxy(torch.rand(3, 5))


# --- masks --------------------------------------------------------------------------------------------------------
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 10**6))
def test_masks_to_boxes_equals_loops_and_torchvision(height, width, n, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, height, width, generator=generator) < 0.2
    masks[:, torch.randint(height, (1,), generator=generator), torch.randint(width, (1,), generator=generator)] = True
    found = masks_to_boxes(masks)
    for mask, box in zip(masks, found, strict=True):
        ys, xs = zip(*mask.nonzero().tolist(), strict=True)
        assert box.tolist() == [min(xs), min(ys), max(xs), max(ys)]
    assert_close(found, ops.masks_to_boxes(masks))


def test_empty_masks_are_named():
    masks = torch.ones(4, 3, 3, dtype=torch.bool)
    masks[[0, 2]] = False
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        masks_to_boxes(masks)


# --- the authors' outputs -----------------------------------------------------------------------------------------
def test_agrees_with_the_official_outputs():
    file = np.load(Path(__file__).parent / "data/box_ops.npz")
    data = {name: torch.from_numpy(value) for name, value in file.items()}
    assert_close(cxcywh_to_xyxy(data["cxcywh"]), data["xyxy"])
    assert_close(xyxy_to_cxcywh(data["xyxy"]), data["back"])
    a, b = data["xyxy"].split(data["iou"].shape)
    assert_close(pairwise_iou(a, b), data["iou"])
    assert_close(intersection_and_union(a[:, None], b[None])[1], data["union"])
    assert_close(pairwise_giou(a, b), data["giou"])
    full = data["masks"].flatten(1).any(1)
    assert full.any()
    assert_close(masks_to_boxes(data["masks"][full]), data["masks_to_boxes"][full])
