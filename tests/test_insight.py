"""Looking into models: every build function, padding, modes, errors; nothing stays behind in the model."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import nms

from detr_nb.attention import MultiHeadAttention, attention_weights
from detr_nb.boxes import cxcywh_to_xyxy, pairwise_iou
from detr_nb.insight import (
    ROLES,
    WeightSnapshots,
    ablate,
    as_grid,
    attention_entropy,
    attention_maps,
    attention_parts,
    capture_attention,
    cells_inside,
    cells_of,
    count_repeats,
    in_box_frame,
    matched_queries,
    nearest_cell,
    non_max_suppression,
    predict_layers,
    share_inside,
    suppressed_queries,
    weights_of,
)
from detr_nb.loading import MemoryDataset
from detr_nb.matcher import HungarianMatcher
from detr_nb.model import (
    DETRDemo,
    TinyModel,
    detr_resnet18,
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_tiny,
)
from detr_nb.notation import Memory, Output, Target

SMALL = {"hidden_dim": 32, "nheads": 4, "enc_layers": 2, "dec_layers": 2}
RESNET = {"num_classes": 4, "num_queries": 7, "pretrained_backbone": False, "dim_feedforward": 64, **SMALL}
BUILDS = {  # name: how to build it, queries, layers in its output
    "detr_tiny": (partial(detr_tiny, num_classes=4, num_queries=7, enc_layers=2, dec_layers=2), 7, 2),
    "detr_resnet18": (partial(detr_resnet18, **RESNET), 7, 2),
    "detr_resnet50": (partial(detr_resnet50, **RESNET), 7, 2),
    "detr_resnet50_dc5": (partial(detr_resnet50_dc5, **RESNET), 7, 2),
    "detr_resnet101": (partial(detr_resnet101, **RESNET), 7, 2),
    "detr_resnet101_dc5": (partial(detr_resnet101_dc5, **RESNET), 7, 2),
    "DETRDemo": (partial(DETRDemo, 4, **SMALL), 100, 1),
}
LARGE = {"detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5"}
every_build = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in BUILDS]
)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDS[name][0]().eval()


def no_hooks(model: nn.Module) -> bool:
    return not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def random_boxes(*shape: int) -> Tensor:
    return torch.cat((torch.rand(*shape, 2) * 0.6 + 0.2, torch.rand(*shape, 2) * 0.35 + 0.05), -1)


# --- maps ---------------------------------------------------------------------------------------------------------
@every_build
def test_maps_of_every_build_are_weights_and_the_model_stays_as_it_was(name):
    model, (_, queries, layers) = make(name), BUILDS[name]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = model(images())
    maps = attention_maps(model, images())
    cells = math.prod(maps.grid)
    assert maps.encoder.shape == (2, 2, 4, cells, cells)
    assert maps.queries.shape == (2, 2, 4, queries, queries) and maps.cross.shape == (2, 2, 4, queries, cells)
    assert maps.xy.shape == (2, cells, 2) and not maps.pad.any() and maps.out.boxes.shape == (layers, 2, queries, 4)
    for role in ROLES:
        weights = getattr(maps, role)
        assert weights.min() >= 0 and not weights.requires_grad
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert no_hooks(model) and not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    exact = name != "DETRDemo"  # torch's encoder takes a fused path when nobody looks
    for ours, theirs in zip(maps.out[:3], plain[:3], strict=True):
        assert_close(ours, theirs, **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}))


def test_maps_equal_softmax_of_the_projections_caught_in_the_model():
    model = make("detr_tiny")
    attention, caught = attention_parts(model)["cross"][1].attention, {}
    for name in "qk":
        getattr(attention, name).register_forward_hook(lambda part, i, out, name=name: caught.setdefault(name, out))
    with torch.no_grad():
        model(images())
    q, k = (caught[name].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for name in "qk")
    assert_close(attention_maps(model, images()).cross[1], (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))


@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_those_of_torchs_module_under_padding_and_bias(bias):
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in (ours.q, ours.k, ours.v)]))
    query, key = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    pad = torch.arange(9) >= torch.tensor([9, 6])[:, None]
    extra = torch.randn(5, 9) if bias else None
    blocked = torch.zeros(2, 9).masked_fill(pad, -torch.inf)  # torch wants both masks of one type
    mine = weights_of(ours, query, key, key, pad=pad, bias=None if extra is None else extra[None, None])
    assert_close(mine, weights_of(theirs, query, key, key, key_padding_mask=blocked, attn_mask=extra))
    assert mine[1, :, :, 6:].abs().max() == 0


def test_padding_gets_no_weight_and_is_never_nearest():
    model, pad = make("detr_tiny"), torch.zeros(2, 64, 64, dtype=torch.bool)
    pad[1, :, 40:] = True
    maps = attention_maps(model, images(), pad)
    hidden = maps.pad[1]
    assert hidden.any() and maps.cross[:, 1, :, :, hidden].max() == 0 and maps.encoder[:, 1, :, :, hidden].max() == 0
    corner = nearest_cell(maps, (1.0, 1.0), 1)
    assert not hidden[corner] and corner == (~hidden).nonzero().max()
    assert nearest_cell(maps, (1.0, 1.0), 0) == len(hidden) - 1


def test_the_demonstration_model_refuses_padding_and_keeps_no_hook():
    model, pad = make("DETRDemo"), torch.zeros(2, 64, 64, dtype=torch.bool)
    pad[0, :, 40:] = True
    with pytest.raises(ValueError, match="cannot ignore padding"):
        attention_maps(model, images(), pad)
    assert no_hooks(model)


def test_hooks_go_and_the_mode_stays_when_the_model_fails():
    model = make("detr_tiny").train()
    with pytest.raises(ValueError, match="all padding"):
        attention_maps(model, images(), torch.ones(2, 64, 64, dtype=torch.bool))
    assert no_hooks(model) and model.training
    with pytest.raises(KeyError), capture_attention(attention_parts(model)):
        raise KeyError("anything")
    with pytest.raises(KeyError), ablate(attention_parts(model)["queries"]):
        raise KeyError("anything")
    assert no_hooks(model)


def test_a_model_in_training_is_looked_at_as_if_evaluated_and_keeps_every_mode():
    model = make("detr_resnet18").train()
    model.encoder.eval()
    modes = [part.training for part in model.modules()]
    maps = attention_maps(model, images())
    assert [part.training for part in model.modules()] == modes
    assert_close(maps.cross, attention_maps(model.eval(), images()).cross)


def test_only_the_roles_that_are_asked_for():
    maps = attention_maps(make("detr_tiny"), images(), roles=["cross"])
    assert maps.encoder is None and maps.queries is None and maps.cross is not None
    with pytest.raises(ValueError, match="encoder, queries, cross, got crossing"):
        attention_maps(make("detr_tiny"), images(), roles=["crossing"])


def test_a_detr_without_encoder_has_no_encoder_map():
    maps = attention_maps(detr_tiny(num_classes=2, enc_layers=0), images())
    assert maps.encoder is None and maps.cross.shape[0] == 3


def test_what_has_no_weights_or_no_grid_is_refused():
    with pytest.raises(ValueError, match="Linear can be asked what it looks at.*none"):
        attention_parts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="memory .or conv. that makes the cells"):
        attention_maps(nn.Sequential(make("DETRDemo").transformer), images())
    three = Memory(*(torch.zeros(1, 5, n) for n in (8, 8)), torch.zeros(1, 5, dtype=torch.bool), torch.zeros(1, 5, 2),
                   ((2, 2), (1, 1)), ())
    with pytest.raises(ValueError, match="2 grids"):
        cells_of(three)
    with pytest.raises(ValueError, match="divide pixels"):
        nearest_cell(attention_maps(make("detr_tiny"), images()), (0.5, -0.1))


def test_cells_as_a_grid():
    rows = torch.arange(24.0).view(2, 12)
    assert torch.equal(as_grid(rows, (3, 4))[1, 2], torch.tensor([20.0, 21, 22, 23]))


# --- measures -----------------------------------------------------------------------------------------------------
def test_entropy_ignores_zeros_and_lies_between_one_cell_and_all():
    weights = attention_weights(torch.randn(3, 2, 5, 4) * 3, torch.randn(3, 2, 9, 4))
    padded = torch.cat((weights, torch.zeros(3, 2, 5, 4)), -1)
    assert_close(attention_entropy(weights), attention_entropy(padded))
    assert attention_entropy(weights).min() > 0 and attention_entropy(weights).max() < math.log(9)


def test_shares_and_frames_agree_with_loops():
    torch.manual_seed(3)
    weights, xy, boxes = torch.rand(2, 3, 4, 30), torch.rand(2, 30, 2), random_boxes(2, 4)
    share, frame = share_inside(weights, xy, boxes), torch.zeros(8, 8)
    for b in range(2):
        for n in range(4):
            left, top, right, bottom = cxcywh_to_xyxy(boxes[b, n]).tolist()
            inside = [left < x < right and top < y < bottom for x, y in xy[b].tolist()]
            assert cells_inside(xy, boxes)[b, n].tolist() == inside
            assert_close(share[b, :, n], weights[b, :, n][:, torch.tensor(inside)].sum(-1))
            for w, (x, y) in zip(weights[b, 0, n].tolist(), xy[b].tolist(), strict=True):
                cx, cy, width, height = boxes[b, n].tolist()
                column, line = math.floor(((x - cx) / width + 1) * 4), math.floor(((y - cy) / height + 1) * 4)
                if 0 <= column < 8 and 0 <= line < 8:
                    frame[line, column] += w / 8
    ours = in_box_frame(weights[:, 0].flatten(0, 1), xy.repeat_interleave(4, 0), boxes.flatten(0, 1), 8)
    assert_close(ours, frame, rtol=1e-4, atol=1e-5)
    assert in_box_frame(torch.zeros(0, 30), torch.zeros(0, 30, 2), torch.zeros(0, 4)).abs().max() == 0


def test_rivals_agree_with_loops():
    torch.manual_seed(4)
    scores, boxes = torch.rand(3, 9), random_boxes(3, 9)
    boxes[:, 1::2] = boxes[:, :-1:2] + 0.01
    found = suppressed_queries(scores, boxes)
    corners = cxcywh_to_xyxy(boxes)
    for b, loser, winner in torch.cartesian_prod(torch.arange(3), torch.arange(9), torch.arange(9)).tolist():
        overlap = pairwise_iou(corners[b, [loser]], corners[b, [winner]]).item()
        assert found[b, loser, winner] == (overlap >= 0.5 and scores[b, loser] < 0.5 <= scores[b, winner])
    assert found.any()


# --- sets ---------------------------------------------------------------------------------------------------------
def random_found(count: int, classes: int = 2) -> dict[str, Tensor]:
    boxes = random_boxes(count)
    boxes[1::2] = boxes[: count // 2 * 2 : 2] + 0.01
    return {"scores": torch.rand(count), "labels": torch.randint(classes, (count,)), "boxes": cxcywh_to_xyxy(boxes)}


@pytest.mark.parametrize("seed", range(5))
def test_repeats_agree_with_brute_force(seed):
    torch.manual_seed(seed)
    found = random_found(40)
    boxes = random_boxes(3)
    found["boxes"][:20] = cxcywh_to_xyxy(boxes)[torch.randint(3, (20,))]
    target = Target(labels=torch.tensor([0, 1, 0]), boxes=boxes)
    owners = []
    for score, label, box in zip(*(found[name] for name in ("scores", "labels", "boxes")), strict=True):
        overlaps = pairwise_iou(box[None], cxcywh_to_xyxy(boxes))[0] * (target["labels"] == label)
        if score >= 0.5 and overlaps.max() >= 0.5:
            owners.append(int(overlaps.argmax()))
    assert count_repeats(found, target) == len(owners) - len(set(owners))


def test_nothing_repeats_where_there_is_nothing():
    empty = Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))
    assert count_repeats(random_found(8), empty) == 0
    assert count_repeats({name: value[:0] for name, value in random_found(8).items()}, empty) == 0
    one = Target(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    assert count_repeats({name: value[:0] for name, value in random_found(8).items()}, one) == 0


@pytest.mark.parametrize("overlap", [0.3, 0.5, 1.0])
def test_suppression_is_that_of_torchvision_class_by_class(overlap):
    torch.manual_seed(1)
    found = random_found(60, classes=3)
    keep = []
    for label in range(3):
        mine = (found["labels"] == label).nonzero().flatten()
        keep += mine[nms(found["boxes"][mine], found["scores"][mine], overlap)].tolist()
    left = non_max_suppression(found, overlap)
    assert_close(left["scores"], found["scores"][keep].sort(descending=True).values)
    assert (len(keep) == 60) == (overlap == 1.0)


def case(objects: tuple[int, ...], queries: int = 6, layers: int = 2) -> tuple[Output, list[Target]]:
    torch.manual_seed(2)
    out = Output(torch.randn(layers, len(objects), queries, 4), random_boxes(layers, len(objects), queries))
    return out, [Target(labels=torch.randint(3, (n,)), boxes=random_boxes(n)) for n in objects]


def test_matched_queries_are_the_matchers_and_objects_left_over_have_none():
    out, targets = case((2, 0, 6, 9))
    table, place = matched_queries(out, targets), 0
    for image, target in enumerate(targets):
        count = len(target["labels"])
        for layer, pairs in enumerate(HungarianMatcher()(out, targets)):
            expected = torch.full((count,), -1)
            expected[pairs[image][1]] = pairs[image][0]
            assert torch.equal(table[layer, place : place + count], expected)
        place += count
    assert table.shape == (2, 17) and (table == -1).sum() == 2 * 3


def dataset(count: int = 5) -> MemoryDataset:
    pictures = torch.randint(256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    targets = [Target(labels=torch.tensor([i % 4]), boxes=box, image_id=i, size=(64, 64)) for i in range(count)]
    return MemoryDataset(pictures, targets, ["a", "b", "c", "d"], [1, 2, 3, 4])


@pytest.mark.parametrize("name", ["detr_tiny", "DETRDemo"])
def test_predictions_of_a_dataset_are_in_its_order_and_the_mode_stays(name):
    model = make(name).train()
    out, targets = predict_layers(model, dataset(), batch_size=2)
    assert model.training and out.logits.shape[:2] == (BUILDS[name][2], 5) and not out.boxes.requires_grad
    assert [target["image_id"] for target in targets] == list(range(5))
    alone, _ = predict_layers(model, dataset(), batch_size=1)
    assert_close(out.boxes, alone.boxes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["detr_tiny", "detr_resnet18", "DETRDemo"])
def test_a_silent_sublayer_is_one_whose_output_map_is_zero(name):
    model = make(name)
    parts, zeroed = attention_parts(model)["queries"], copy.deepcopy(model)
    for part in attention_parts(zeroed)["queries"]:
        for value in (part.out if hasattr(part, "out") else part.out_proj).parameters():
            nn.init.zeros_(value)
    with torch.no_grad(), ablate(parts):
        silent = model(images())
    with torch.no_grad():
        assert_close(silent.boxes, zeroed(images()).boxes)
        assert not torch.equal(silent.logits, model(images()).logits)
    assert no_hooks(model)


def test_a_film_holds_copies_of_the_weights_at_training_steps_only():
    source = WeightSnapshots(TinyModel(num_queries=4), every=2)
    model = source.build(3)
    model.eval()(images())
    for _ in range(4):
        model.train()(images())
        with torch.no_grad():
            model.queries.embedding.weight += 1
    assert list(source.film) == [0, 2]
    first, second = (weights["queries.embedding.weight"] for weights in source.film.values())
    assert_close(second, first + 2)
