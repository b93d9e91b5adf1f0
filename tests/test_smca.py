"""SMCA: the authors' outputs, types of which there are none, and what every member of the family must do."""

import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from family import Member
from test_seams import TINY, Pairs, pictures, truth
from torch import Tensor
from torch.testing import assert_close

from detr_nb.config import ConfigError
from detr_nb.family.focal import FocalDETR
from detr_nb.family.smca import SMCADETR, gaussian_bias
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.insight import attention_maps
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, ResNetConfig, SigmoidScores, TinyConfig
from detr_nb.notation import Memory, Target
from detr_nb.pretrained import load_pretrained, pretrained_model
from detr_nb.training import TrainConfig, fit

SMALL = SMCADETR(num_queries=5, **TINY)
RESNET18 = ResNetConfig("resnet18", pretrained=False)
TYPES = pytest.mark.parametrize("scales", range(4))


def shaken(config: SMCADETR, seed: int = 0) -> DETR:
    """A model whose bells and boxes are not those of the start."""
    torch.manual_seed(seed)
    model = config.build(3).eval()
    with torch.no_grad():
        for part in (model.decoder.query_position, model.decoder.head, model.queries):
            for parameter in part.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


# --- the authors' outputs -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    sizes = {"num_queries": 20, "enc_layers": 2, "dec_layers": 6, "dim_feedforward": 128}
    return Member("smca_r18_small_type3", SMCADETR(RESNET18, **sizes), tmp_path_factory.mktemp("smca"))


def test_predictions_are_the_authors(reference):
    reference.check_predictions()


def test_losses_and_matches_are_the_authors(reference):
    reference.check_losses()


def test_detections_are_the_authors(reference):
    reference.check_detections()


def test_their_file_alone_tells_which_model_it_is(reference):
    model = pretrained_model(reference.file)
    assert replace(model.config, dropout=0) == replace(reference.config, dropout=0) and model.num_classes == 91
    assert_close(model.state_dict(), reference.model().state_dict(), rtol=0, atol=0)


def test_the_memory_knows_the_sizes_that_the_authors_are_told(reference):
    model = SMALL.build(3)
    for key, sizes in (("", ((192, 256), (160, 224))), ("odd/", ((203, 251), (150, 217)))):
        pad = torch.ones(2, max(h for h, _ in sizes), max(w for _, w in sizes), dtype=torch.bool)
        for row, (height, width) in zip(pad, sizes, strict=True):
            row[:height, :width] = False
        with torch.no_grad():
            memory = model.memory(torch.zeros(2, 3, *pad.shape[1:]), pad)
        assert_close(memory.cells[:, 0].flip(1) * 8, reference[f"{key}sizes"].float())


# --- the types ------------------------------------------------------------------------------------------------------
def slow_bias(model: DETR, layer: int, content: Tensor, pos: Tensor, memory: Memory) -> Tensor:
    """The Gaussian of each cell, head and query of the first image, from the formula, in loops and Python's numbers."""
    part = model.decoder.query_position
    rows, columns = memory.shapes[0]
    found = torch.zeros(part.heads, len(pos[0]), rows * columns)
    for q, vector in enumerate(pos[0]):
        share = torch.sigmoid(model.queries.point(part.norms[0](vector)))
        point = [float(share[0] * memory.cells[0, 0, 0]), float(share[1] * memory.cells[0, 0, 1])]
        seen = part.norms[layer](content[0, q] + vector)
        offsets = part.offsets[layer](seen).tolist()
        scales = part.scales[layer](seen).tolist() if part.scales else []
        for h in range(part.heads):
            x0, y0 = point[0] + offsets[2 * h], point[1] + offsets[2 * h + 1]
            n = model.config.dynamic_scale
            own = scales[n * h : n * h + n]
            for cell in range(rows * columns):
                dx2, dy2 = (cell % columns - x0) ** 2, (cell // columns - y0) ** 2
                if n == 0:
                    far = dx2 + dy2
                elif n == 1:
                    far = own[0] ** 2 * (dx2 + dy2)
                elif n == 2:
                    far = own[0] ** 2 * dx2 + own[1] ** 2 * dy2
                else:
                    far = own[0] ** 2 * dx2 + own[1] ** 2 * dy2 + own[2] ** 2 * dx2 * dy2
                found[h, q, cell] = -far / model.config.smooth
    return found


@TYPES
def test_every_type_is_the_formula_in_loops(scales):
    model = shaken(replace(SMALL, dynamic_scale=scales, smooth=5))
    pad = torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[0, 50:], pad[0, :, 75:] = True, True
    with torch.no_grad():
        memory = model.encoder(model.memory(pictures(), pad))
        queries = model.queries(memory)
        for layer, content in enumerate((queries.content, torch.randn(2, 5, 16))):
            where = model.decoder.query_position(layer, content, queries.pos, queries.ref, memory)
            assert where.extra.shape == (2, 2, 5, 96)
            slow = slow_bias(model, layer, content, queries.pos, memory)
            assert_close(where.extra[0], slow, rtol=1e-4, atol=1e-4)


@TYPES
def test_every_type_trains_all_its_parts(scales):
    model = shaken(replace(SMALL, dynamic_scale=scales)).train()
    criterion = criterion_for(model)
    criterion.total(criterion(model(pictures()), truth())).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # the content of all queries is zero in layer 0, as in DETR
    start = tuple(f"decoder.layers.0.{part}" for part in ("attention.", "attention_step.norm.", "cross_step.norm."))
    assert not {name for name in without if not name.endswith("k.bias") and not name.startswith(start)}


def test_scales_are_from_none_to_three():
    with pytest.raises(ConfigError, match="dynamic_scale"):
        SMCADETR(dynamic_scale=4)


# --- the new part neutralised ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_without_scales_and_points_it_is_detr(scales):
    """Scales zero: dense attention. Points at the middle, whose logit is zero: boxes that count from nothing."""
    model = shaken(replace(SMALL, dynamic_scale=scales))
    plain = FocalDETR(num_queries=5, **TINY).build(4).eval()
    pad = torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 40:] = True

    def load() -> None:
        own = plain.state_dict().keys()
        plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})

    with torch.no_grad():
        load()
        assert (plain(pictures(), pad).logits - model(pictures(), pad).logits).abs().max() > 0.01
        for part in (*model.decoder.query_position.scales, model.queries.point[-1]):
            part.weight.zero_()
            part.bias.zero_()
        load()
        assert_close(model(pictures(), pad)[:3], plain(pictures(), pad)[:3])


# --- what every member does -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    few = {"steps": 2, "batch_size": 4, "evaluations": 1, "log_every": 1, "scales": (), "progress": False}
    return fit(TrainConfig(Pairs(), SMALL, folder=str(tmp_path_factory.mktemp("run") / "run"), **few))


def test_it_trains(run):
    assert all(math.isfinite(value) for value in run.history[-1].values() if isinstance(value, float))
    assert 0 <= run.metrics["AP"] <= 1 and run.model.scores == SigmoidScores(5, spare=1)


def test_runs_and_saved_folders_load_as_what_they_are(run, tmp_path):
    run.model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        out = run.model(pictures())
        for source in (run.folder, tmp_path):
            model = pretrained_model(source)
            assert model.config == SMALL and model.decoder.query_position.norms[0] is model.queries.norm
            assert_close(model(pictures())[:2], out[:2])


def test_images_without_objects_train():
    model = SMALL.build(3).train()
    nothing = [Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))] * 2
    criterion = criterion_for(model)
    total = criterion.total(criterion(model(pictures()), nothing))
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_new_classes_and_other_queries(run):
    model = replace_head(pretrained_model(run.folder), 7, keep={4: 2})
    assert model.num_classes == 7 and model.head.classes.out_features == 8
    old = run.model.queries
    model = resize_queries(model, 8, keep=[3, 1])
    assert model.config.num_queries == 8 and model(pictures()).logits.shape == (2, 2, 8, 8)
    assert_close(model.queries.embedding.weight[:2], old.embedding.weight[[3, 1]])
    assert_close(model.queries.point.state_dict(), old.point.state_dict())


def test_what_it_looks_at_is_drawn_as_for_detr(run):
    maps = attention_maps(run.model, pictures())
    assert maps.cross.shape == (2, 2, 2, 5, 96)
    assert_close(maps.cross.sum(-1), torch.ones(2, 2, 2, 5))


def test_bf16_and_half_precision():
    model = shaken(SMALL)
    with torch.no_grad():
        out = model(pictures())
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(pictures()).logits.float() - out.logits).abs().max() < 0.3
        assert model.bfloat16()(pictures().bfloat16()).boxes.dtype == torch.bfloat16


# --- other sizes ----------------------------------------------------------------------------------------------------
def test_the_full_model_and_the_dilated_one_can_be_built():
    with torch.device("meta"):
        for dilation in (False, True):
            model = SMCADETR(ResNetConfig(dilation=dilation, pretrained=False)).build(91)
            learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert 41.5e6 < learning < 42.2e6 and model.config.num_queries == 300
            assert model.backbone.strides[-1] == (16 if dilation else 32)


def test_the_real_stride_counts():
    """In the same picture the point of a query lies at twice as many cells where cells are half as large."""
    cells = []
    for last in (8, 16):
        model = replace(SMALL, backbone=TinyConfig((16, 16, 16), (4, 8, last))).build(3)
        cells.append(model.memory(pictures(), torch.zeros(2, 64, 96, dtype=torch.bool)).cells)
    assert_close(cells[0], 2 * cells[1])


@TYPES
def test_files_of_every_type_are_told_from_each_other(scales, tmp_path):
    model = replace(SMALL, dynamic_scale=scales).build(3)
    torch.save({"model": model.state_dict(), "args": Namespace(nheads=2)}, tmp_path / "model.pth")
    load_pretrained(replace(SMALL, dynamic_scale=scales).build(3), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="does not fit"):
        load_pretrained(replace(SMALL, dynamic_scale=(scales + 1) % 4).build(3), tmp_path / "model.pth")


@pytest.mark.parametrize(("scales", "smooth"), [(0, 8), (4, 8), (2, 0), (2, -1)])
def test_a_gaussian_that_cannot_be_is_named(scales, smooth):
    with pytest.raises(ValueError, match=f"got {scales} scales, smooth={smooth}"):
        gaussian_bias(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, scales), (2, 3), smooth)


def test_a_bias_of_one_scale_is_the_same_in_both_directions():
    centres = torch.rand(1, 2, 3, 2) * 4
    one = gaussian_bias(centres, torch.full((1, 1, 1, 1), 1.5), (5, 5))
    assert_close(one, gaussian_bias(centres, torch.full((1, 1, 1, 2), -1.5), (5, 5)))
