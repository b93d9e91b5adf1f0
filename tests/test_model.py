"""The model against the authors' own outputs, and what can go wrong around it."""

import json
import math
import subprocess
import sys
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official import DATA, Reference, batch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from detr_nb import model as chapter
from detr_nb.backbone import TinyBackbone
from detr_nb.evaluation import evaluate
from detr_nb.losses import SetCriterion
from detr_nb.matcher import HungarianMatcher
from detr_nb.model import (
    DETRDemo,
    SigmoidScores,
    SoftmaxScores,
    cell_centres,
    check_images,
    check_padding,
    detr,
    detr_resnet50,
    detr_tiny,
    postprocess,
    resize_padding,
)
from detr_nb.notation import Output, toy_output
from detr_nb.shapes import DEFAULT, Scenes

REFERENCES = ["detr_r18_small", pytest.param("detr_r50", marks=pytest.mark.slow)]
BATCHES = {"": ("image0_", (192, 256), (160, 224)), "odd/": ("image5_", (203, 251), (150, 217))}
close = torch.testing.assert_close


@cache
def run(name: str) -> tuple[Reference, dict[str, Output]]:
    """A reference and our predictions for its two batches."""
    reference = Reference(name)
    model = reference.model()
    with torch.no_grad():
        return reference, {key: model(*batch(*what)) for key, what in BATCHES.items()}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("key", BATCHES, ids=["even", "odd"])
def test_predictions_of_every_layer_are_the_official_ones(name, key):
    reference, ours = run(name)
    out = ours[key]
    logits = torch.cat((reference[key + "aux_logits"], reference[key + "pred_logits"][None]))
    boxes = torch.cat((reference[key + "aux_boxes"], reference[key + "pred_boxes"][None]))
    close(out.logits, logits, atol=5e-4, rtol=0)
    close(out.boxes, boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REFERENCES)
def test_one_image_alone_is_the_official_prediction(name):
    reference = run(name)[0]
    images, _ = batch("image0_", (192, 256))
    with torch.no_grad():
        out = reference.model()(images)
    close(out.logits[-1], reference["single0/pred_logits"], atol=5e-4, rtol=0)
    close(out.boxes[-1], reference["single0/pred_boxes"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REFERENCES)
def test_matches_and_losses_are_the_official_ones(name):
    reference, ours = run(name)
    targets = reference.targets()
    criterion = SetCriterion(91)
    for ours_i, theirs_i in zip(HungarianMatcher()(ours[""], targets), reference.matches(), strict=True):
        for pair, theirs in zip(ours_i, theirs_i, strict=True):
            assert torch.equal(torch.stack(pair), theirs)
    losses = criterion(ours[""], targets)
    official = reference.under("loss/")
    assert losses.keys() == official.keys()
    close(losses, {key: official[key] for key in losses}, atol=5e-4, rtol=1e-4)
    close(criterion.total(losses), reference["total_loss"], atol=5e-3, rtol=1e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_postprocess_is_the_official_one(name):
    reference, ours = run(name)
    sizes = [tuple(reference[f"target{i}/orig_size"].tolist()) for i in range(2)]
    for i, found in enumerate(postprocess(ours[""], sizes)):
        official = reference.under(f"post{i}/")
        close(found["scores"], official["scores"], atol=1e-4, rtol=0)
        close(found["boxes"], official["boxes"], atol=1e-4 * max(sizes[i]), rtol=0)
        assert torch.equal(found["labels"], official["labels"])


def test_a_wrong_detail_is_seen_by_the_comparison():
    """The tolerances are tight enough: without the mask the official outputs are missed by far."""
    reference, ours = run("detr_r18_small")
    images, pad = batch(*BATCHES["odd/"])
    with torch.no_grad():
        blind = reference.model()(images, torch.zeros_like(pad))
    assert (blind.logits[-1] - ours["odd/"].logits[-1]).abs().max() > 0.05


def test_parameters_are_counted_as_in_the_official_model():
    """About 41 million (DETR, table 1); the official file lists the frozen norms too, which are buffers."""
    model = detr_resnet50(91, pretrained_backbone=False)
    state = json.loads((DATA / "detr_r50.json").read_text())["state"]
    norms = (".bn", "downsample.1")
    official = sum(math.prod(shape) for name, shape, *_ in state if not any(norm in name for norm in norms))
    count = sum(p.numel() for p in model.parameters())
    assert count == official and 41e6 < count < 42e6


def largest(weight: torch.Tensor) -> float:
    return weight.detach().abs().max().item()


def test_initialisation_is_the_official_one():
    """Xavier for the matrices of the transformer (attention's three maps as one); torch's defaults in the heads."""
    torch.manual_seed(0)
    d, hidden = 256, 512
    model = detr(TinyBackbone(), 91, 400, d, 8, 1, 1, hidden)
    layer = model.decoder.layers[0]
    peer = nn.MultiheadAttention(d, 8)  # keeps its own stacked Xavier
    for attention in (layer.attention, layer.cross.attention, model.encoder.layers[0].attention):
        stacked = torch.cat((attention.q.weight, attention.k.weight, attention.v.weight))
        assert math.isclose(largest(stacked), largest(peer.in_proj_weight), rel_tol=1e-3)
        assert math.isclose(largest(attention.out.weight), math.sqrt(6 / (d + d)), rel_tol=1e-3)
        assert all(largest(part.bias) == 0 for part in (attention.q, attention.k, attention.v, attention.out))
    for linear in (layer.feed_forward[0], layer.feed_forward[3]):
        assert math.isclose(largest(linear.weight), math.sqrt(6 / (d + hidden)), rel_tol=1e-3)
    for linear in (model.decoder.head.classes, model.decoder.head.boxes[0], model.decoder.head.boxes[4]):
        assert math.isclose(largest(linear.weight), 1 / math.sqrt(d), rel_tol=1e-2)
        assert 0 < largest(linear.bias) <= 1 / math.sqrt(d)
    assert math.isclose(largest(model.memory.project.weight), 1 / math.sqrt(128), rel_tol=1e-2)
    queries = model.queries.embedding.weight
    assert abs(queries.mean()) < 0.02 and abs(queries.std() - 1) < 0.02


def test_without_auxiliary_losses_only_the_last_layer_is_returned():
    torch.manual_seed(0)
    model = detr_tiny().eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        every = model(images)
        model.aux_loss = False
        last = model(images)
    assert len(every.logits) == 3 and len(last.logits) == 1
    assert torch.equal(last.logits[-1], every.logits[-1]) and torch.equal(last.boxes[-1], every.boxes[-1])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # torch's word on the speed of sequence-first input
def test_the_demo_model_equals_its_formula_one_image_at_a_time():
    """The reference builds the positions cell by cell and lets torch's transformer run sequence-first, unbatched."""
    torch.manual_seed(0)
    model = DETRDemo(5, hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2).eval()
    peer = nn.Transformer(32, 4, 1, 2).eval()
    peer.load_state_dict(model.transformer.state_dict())
    body = IntermediateLayerGetter(model.backbone, {"layer4": "last"})
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        out = model(images)
        for row, image in enumerate(images):
            features = model.conv(body(image[None])["last"])[0]
            _, rows, cols = features.shape
            cells = [torch.cat((model.col_embed[x], model.row_embed[y])) + 0.1 * features[:, y, x]
                     for y in range(rows) for x in range(cols)]
            content = peer(torch.stack(cells), model.query_pos)
            torch.testing.assert_close(out.logits[0, row], model.linear_class(content), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(out.boxes[0, row], model.linear_bbox(content).sigmoid(), atol=1e-4, rtol=1e-4)


def test_the_parts_of_the_demo_model_have_the_names_of_the_original_listing():
    names = {key.split(".")[0] for key in DETRDemo(5, 32, 4, 1, 1).state_dict()}
    layers = {"backbone", "conv", "transformer", "linear_class", "linear_bbox"}
    assert names == layers | {"query_pos", "row_embed", "col_embed"}


def test_the_demo_model_starts_from_the_weights_of_the_paper(monkeypatch):
    asked, donor = [], DETRDemo(5, 32, 4, 1, 1)
    monkeypatch.setattr(chapter, "imagenet_weights", lambda name: asked.append(name) or donor.backbone.state_dict())
    model = DETRDemo(5, 32, 4, 1, 1, pretrained_backbone=True)
    assert asked == ["resnet50"]
    assert all(torch.equal(p, q) for p, q in zip(model.backbone.parameters(), donor.backbone.parameters(), strict=True))
    assert not torch.equal(model.conv.weight, donor.conv.weight)


def test_the_demo_model_names_its_limits():
    model = DETRDemo(5, hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1).eval()
    pad = torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64), pad).boxes.shape == (1, 1, 100, 4)  # a mask without padding is fine
        with pytest.raises(ValueError, match="cannot ignore padding"):
            model(torch.zeros(1, 3, 64, 64), ~pad)
        with pytest.raises(ValueError, match="51 x 1 cells needs more than 50"):
            model(torch.zeros(1, 3, 51 * 32, 32))


@given(height=st.integers(1, 70), width=st.integers(1, 70), rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_the_mask_is_shrunk_by_picking_the_pixel_at_the_cell_start(height, width, rows, cols):
    pad = torch.rand(1, height, width, generator=torch.Generator().manual_seed(height * width)) < 0.5
    y = [row * height // rows for row in range(rows)]
    x = [col * width // cols for col in range(cols)]
    assert torch.equal(resize_padding(pad, (rows, cols))[0], pad[0][y][:, x])


@given(sizes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=3))
def test_cell_centres_are_shares_of_the_unpadded_image(sizes):
    pad = torch.ones(len(sizes), 7, 9, dtype=torch.bool)
    for mask, (rows, cols) in zip(pad, sizes, strict=True):
        mask[:rows, :cols] = False
    centres = cell_centres(pad)
    assert centres.isfinite().all()
    for image, (rows, cols) in zip(centres, sizes, strict=True):
        for row in range(rows):
            for col in range(cols):
                assert image[row, col].tolist() == pytest.approx([(col + 0.5) / cols, (row + 0.5) / rows])


@given(classes=st.integers(1, 20), queries=st.integers(1, 20), height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_postprocess_agrees_with_plain_loops(classes, queries, height, width):
    generator = torch.Generator().manual_seed(classes + 100 * queries)
    logits = torch.randn(2, 1, queries, classes + 1, generator=generator)
    boxes = torch.rand(2, 1, queries, 4, generator=generator)
    (found,) = postprocess(Output(logits, boxes), [(height, width)])
    for q in range(queries):
        weights = [math.exp(logit) for logit in logits[-1, 0, q].tolist()]
        probability = [weight / sum(weights) for weight in weights]
        assert math.isclose(found["scores"][q], max(probability[:-1]), rel_tol=1e-4)
        assert found["labels"][q] == probability.index(max(probability[:-1]))
        cx, cy, w, h = boxes[-1, 0, q].tolist()
        corners = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        torch.testing.assert_close(found["boxes"][q], torch.tensor(corners), atol=1e-2, rtol=1e-4)


def test_postprocess_takes_a_tensor_of_sizes_and_other_scores():
    sizes = torch.tensor([[6, 8]])
    plain = postprocess(toy_output(), [(6, 8)])[0]
    assert all(torch.equal(plain[key], value) for key, value in postprocess(toy_output(), sizes)[0].items())
    sigmoid = postprocess(toy_output(), sizes, scores=SigmoidScores(top=5, spare=1))[0]
    asked = toy_output().logits[-1, 0, :, :2].sigmoid()  # the last column is spare
    best, places = asked.flatten().sort(descending=True)
    torch.testing.assert_close(sigmoid["scores"], best[:5])
    assert torch.equal(sigmoid["labels"], places[:5] % 2)
    torch.testing.assert_close(sigmoid["boxes"], plain["boxes"][places[:5] // 2])


def test_postprocess_keeps_boxes_beyond_the_border_and_rounds_nothing():
    out = Output(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 1.0, 0.5, 0.5]]]]))
    expected = torch.tensor([[-160.0, 360.0, 160.0, 600.0]])
    torch.testing.assert_close(postprocess(out, [(480, 640)])[0]["boxes"], expected)
    half = Output(out.logits.bfloat16(), torch.full((1, 1, 1, 4), 0.25).bfloat16())
    assert postprocess(half, [(480, 641)])[0]["boxes"].dtype == torch.float32  # bfloat16 steps by 4 beyond 512 pixels


def test_postprocess_needs_a_size_for_every_image():
    with pytest.raises(ValueError, match="1 images need as many"):
        postprocess(toy_output(), [(6, 8), (6, 8)])


def test_scores_leave_out_no_object():
    logits = toy_output().logits
    torch.testing.assert_close(SoftmaxScores()(logits), nn.Softmax(-1)(logits)[..., :2])


@pytest.mark.parametrize("wrong", [
    torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
], ids=["no batch", "grey", "channels last", "bytes"])
def test_wrong_images_are_refused(wrong):
    with pytest.raises(ValueError, match="b 3 y x"):
        check_images(wrong, None)


@pytest.mark.parametrize("wrong", [
    torch.zeros(1, 8, 9, dtype=torch.bool), torch.zeros(2, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8),
    torch.zeros(8, 8, dtype=torch.bool),
], ids=["width", "batch", "float", "no batch"])
def test_a_wrong_mask_is_refused(wrong):
    with pytest.raises(ValueError, match="pad must be boolean"):
        check_images(torch.zeros(1, 3, 8, 8), wrong)


def test_an_image_that_is_all_padding_is_named():
    pad = torch.zeros(3, 64, 64, dtype=torch.bool)
    pad[1] = True
    with pytest.raises(ValueError, match=r"images \[1\] of the batch are all padding"):
        detr_tiny()(torch.zeros(3, 3, 64, 64), pad)


@pytest.mark.parametrize("build", [detr_tiny, DETRDemo, SoftmaxScores().columns, SigmoidScores().columns])
def test_a_detector_without_classes_is_refused(build):
    with pytest.raises(ValueError, match="at least one class"):
        build(num_classes=0)


def test_a_detector_without_queries_is_refused():
    with pytest.raises(ValueError, match="num_queries is 0: it must be a whole number of at least 1"):
        detr_tiny(num_queries=0)


def test_the_check_of_the_padding_is_no_part_of_an_exported_graph():
    class Check(nn.Module):
        def forward(self, pad):
            check_padding(pad)
            return ~pad

    exported = torch.export.export(Check(), (torch.zeros(2, 3, 3, dtype=torch.bool),), strict=False)
    assert exported.module()(torch.ones(2, 3, 3, dtype=torch.bool)).sum() == 0


def save_weights(folder, model: nn.Module) -> None:
    """Put a file of trained weights where the package would carry it."""
    (folder / "weights").mkdir()
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    saved = {"model": state, "names": list("abcdef"), "category_ids": list(range(1, 7))}
    torch.save(saved, folder / "weights" / "detr_tiny.pt")


def test_carried_weights_are_loaded_with_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "files", lambda package: tmp_path)
    torch.manual_seed(0)
    trained = detr_tiny()
    save_weights(tmp_path, trained)
    model = detr_tiny(pretrained=True)
    assert not model.training and model.names == list("abcdef") and model.category_ids == [1, 2, 3, 4, 5, 6]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        images = torch.randn(1, 3, 128, 128)
        torch.testing.assert_close(model(images).boxes, trained.eval()(images).boxes, atol=5e-3, rtol=0)
    shapes = ({"num_classes": 3}, {"num_queries": 7}, {"hidden_dim": 64}, {"dec_layers": 2})
    silent = ({"nheads": 8}, {"pre_norm": False}, {"temperature": 10000}, {"strides": (4, 8, 16)})
    for wrong in (*shapes, *silent):
        with pytest.raises(ValueError, match="default arguments"):
            detr_tiny(pretrained=True, **wrong)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="no trained weights"):
        detr_tiny(pretrained=True)


def test_the_carried_model_says_nothing_about_an_empty_picture():
    model = detr_tiny(pretrained=True)
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 128, 128))
    assert len(model.names) == len(model.category_ids) == out.logits.shape[-1] - 1
    assert out.logits[-1].argmax(-1).eq(len(model.names)).float().mean() > 0.5


@pytest.mark.slow
def test_the_carried_model_detects_on_scenes_that_it_has_not_seen():
    """Weights that do not belong to the code, to its generator or to its normalisation detect next to nothing."""
    scenes = Scenes(DEFAULT, count=100, seed=4321)
    trained, untrained = detr_tiny(pretrained=True), detr_tiny()
    assert trained.names == scenes.names
    assert evaluate(trained, scenes)["AP50"] > 0.4
    assert evaluate(untrained, scenes)["AP50"] < 0.05


@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_half_precision_stays_near_full_precision(mode):
    """Positions follow the features' type; matching and losses compute in single precision again."""
    torch.manual_seed(0)
    model, images = detr_tiny().eval(), torch.randn(2, 3, 64, 96)
    pad = torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 32:] = True
    with torch.no_grad():
        full = model(images, pad)
        if mode == "weights":
            half = model.bfloat16()(images.bfloat16(), pad)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                half = model(images, pad)
    assert half.logits.dtype == torch.bfloat16
    torch.testing.assert_close(half.boxes.float(), full.boxes, atol=0.02, rtol=0)
    torch.testing.assert_close(half.logits.float(), full.logits, atol=0.2, rtol=0)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    ours, theirs = SetCriterion(6)(half, targets), SetCriterion(6)(full, targets)
    assert ours["loss_giou"].dtype == torch.float32
    torch.testing.assert_close(ours["loss_giou"], theirs["loss_giou"], atol=0.1, rtol=0)


EXPORT = """
import torch
from detr_nb.model import detr_tiny
torch.manual_seed(0)
model, auto = detr_tiny().eval(), torch.export.Dim.AUTO
shapes = {"images": {0: auto, 2: auto, 3: auto}, "pad": {0: auto, 1: auto, 2: auto}}
example = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
graph = torch.export.export(model, example, dynamic_shapes=shapes, strict=False).module()
images, pad = torch.randn(3, 3, 80, 112), torch.zeros(3, 80, 112, dtype=torch.bool)
pad[2, 48:] = True
with torch.no_grad():
    torch.testing.assert_close(graph(images, pad)[:3], model(images, pad)[:3], atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
def test_one_exported_graph_serves_batches_of_any_size():
    """In a process of its own: the type checker of these tests would pin the sizes."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", EXPORT], check=True, cwd=DATA.parents[1], timeout=300)
