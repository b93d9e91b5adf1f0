"""Deformable DETR beside its authors' recorded outputs, Hugging Face's model, and what it is without its new parts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from family import SIZES, Member, pictures
from official import DATA
from small_runs import Drawn, series
from torch import Tensor, nn
from torch.testing import assert_close

from detr_nb.checkpoints import Checkpoint
from detr_nb.family import deformable
from detr_nb.family.deformable import (
    DeformableDETR,
    SampledAttention,
    SampledCellAttention,
    SampledCrossAttention,
    read_deformable,
    sample_grids,
    sample_rows,
    sampled_layouts,
    sampling_points,
)
from detr_nb.family.focal import FocalDETR
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.insight import attention_maps, capture_attention
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, ResNetConfig, SigmoidScores, TinyConfig
from detr_nb.notation import Target
from detr_nb.pretrained import (
    adjust_state,
    convert_names,
    load_pretrained,
    pretrained_model,
)
from detr_nb.training import TrainConfig, fit
from detr_nb.transformer import QueryPosition

SMALL = DeformableDETR(ResNetConfig("resnet50", pretrained=False), 20, 64, 4, 2, 2, 128, 0.0)
REFERENCES = {"deformable_detr_small": SMALL, "deformable_detr_refine_small": replace(SMALL, with_box_refine=True)}


# --- the operator ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def core() -> dict[str, Tensor]:
    """What the authors' operator was given and gave, in double precision."""
    return {name: torch.from_numpy(value) for name, value in np.load(DATA / "ms_deform_attn_core.npz").items()}


@pytest.mark.parametrize("read", [sample_grids, sample_rows])
def test_the_operator_and_its_gradients_are_the_authors(core, read):
    given = [core[name].clone().requires_grad_() for name in ("value", "loc", "weights")]
    found = read(given[0], [tuple(shape) for shape in core["shapes"].tolist()], *given[1:])
    assert_close(found, core["out"], atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(found, given, core["grad_out"])
    for ours, name in zip(gradients, ("gv", "gloc", "gw"), strict=True):
        assert_close(ours, core[name], atol=1e-12, rtol=0)


def asked(shapes: list[tuple[int, int]], b: int = 2, q: int = 5, h: int = 3, p: int = 2, k: int = 4,
          spread: float = 1.0) -> list[Tensor]:
    """Values, points and weights; points lie around the middle of the picture."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(b, sum(y * x for y, x in shapes), h, k, generator=draw).double()
    points = 0.5 + spread * torch.randn(b, q, h, len(shapes), p, 2, generator=draw).double()
    weights = torch.randn(b, q, h, len(shapes) * p, generator=draw).double().softmax(-1)
    return [part.requires_grad_() for part in (values, points, weights.unflatten(-1, (len(shapes), p)))]


@pytest.mark.parametrize("shapes", [
    [(6, 8), (3, 4), (2, 2)], [(5, 7)], [(1, 1)], [(1, 1), (4, 3)], [(2, 9), (1, 1), (9, 2)], [(1, 6), (6, 1)],
], ids=str)
@pytest.mark.parametrize("spread", [0.1, 1.0, 100.0])  # inside, here and there, far outside
def test_both_forms_of_the_operator_agree(shapes, spread):
    given = asked(shapes, spread=spread)
    found = [read(given[0], shapes, *given[1:]) for read in (sample_grids, sample_rows)]
    assert_close(found[1], found[0])
    upstream = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(1)).double()
    theirs, ours = (torch.autograd.grad(out, given, upstream) for out in found)
    assert_close(ours, theirs)
    if spread == 100:
        assert (found[0] == 0).any()


@pytest.mark.parametrize("learning", [(0,), (1,), (2,), (1, 2)])
def test_a_gradient_alone_is_the_same(learning):
    given = [part.detach().requires_grad_(i in learning) for i, part in enumerate(asked([(4, 3), (2, 2)]))]
    found = [read(given[0], [(4, 3), (2, 2)], *given[1:]) for read in (sample_grids, sample_rows)]
    wanted = [given[i] for i in learning]
    theirs, ours = (torch.autograd.grad(out.square().sum(), wanted) for out in found)
    assert_close(ours, theirs)


@pytest.mark.parametrize("read", [sample_grids, sample_rows])
def test_what_is_no_number_stays_none_and_breaks_nothing(read):
    values, points, weights = (part.detach() for part in asked([(4, 3)], b=1, q=4))
    points[0, 0], points[0, 1], points[0, 2] = torch.nan, torch.inf, -torch.inf
    found = read(values, [(4, 3)], points, weights)
    assert found[0, 0].isnan().all() and found[0, 3].isfinite().all()
    weights[0, 3, 0, 0, 0] = torch.nan
    assert read(values, [(4, 3)], points, weights)[0, 3].isnan().any()


def test_the_form_is_chosen_by_who_asks(monkeypatch):
    seen = []
    for read in (sample_grids, sample_rows):
        note = lambda *given, read=read: seen.append(read) or given[2].flatten(2)  # noqa: E731
        monkeypatch.setattr(deformable, read.__name__, note)
    few, many = asked([(8, 8)], q=4), asked([(8, 8)], q=64)
    for values, points, weights in (few, many):
        deformable.sample(values, [(8, 8)], points, weights)
    with torch.device("meta"):
        given = [torch.empty_like(part, device="meta") for part in many]
    deformable.sample(given[0], [(8, 8)], *given[1:])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    deformable.sample(many[0], [(8, 8)], *many[1:])
    assert seen == [sample_grids, sample_rows, sample_grids, sample_grids]


# --- the authors ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=REFERENCES)
def authors(request, tmp_path_factory) -> Member:
    """The authors' small model, read from their checkpoint once."""
    return Member(request.param, REFERENCES[request.param], tmp_path_factory.mktemp(request.param))


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


def test_their_file_tells_what_it_holds(authors):
    model = pretrained_model(authors.file)
    assert replace(model.config, dropout=0.0) == authors.config and model.scores == SigmoidScores(100)
    assert model.threshold == DeformableDETR.THRESHOLD
    assert_close(model.state_dict(), authors.model().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["detr_r18_small", "dab_detr_r18_small", "smca_r18_small_type3", "anchor_detr_small",
                                  "conditional_detr_small", "deformable_detr_two_stage_small"])
def test_files_of_others_are_left_to_others(name):
    names = [row[0] for row in json.loads((DATA / f"{name}.json").read_text())["state"]]
    assert read_deformable(Checkpoint(dict.fromkeys(names, torch.empty(0)), {})) is None


def test_the_full_model():
    """As many parameters as the authors' table says, in millions, and as Hugging Face's model has."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
    from transformers import ResNetConfig as Body

    sizes = {}
    for refine in (False, True):
        with torch.device("meta"):
            model = DeformableDETR(ResNetConfig("resnet50", pretrained=False), with_box_refine=refine).build(91)
            body = Body(out_features=["stage2", "stage3", "stage4"])
            config = DeformableDetrConfig(backbone_config=body, num_labels=91, with_box_refine=refine)
            theirs = DeformableDetrForObjectDetection(config)
        sizes[refine] = [sum(p.numel() for p in one.parameters()) for one in (model, theirs)]
    assert sizes[False][0] == sizes[False][1] and 39.5e6 < sizes[False][0] < 40.5e6
    assert sizes[True][0] == sizes[True][1] + 5 * (256 + 1) * 91  # they share the class head even here
    assert 40.5e6 < sizes[True][0] < 41.5e6
    assert criterion_for(model).weights["loss_ce"] == 2 and model.scores.top == 100 and model.queries.count == 300
    assert model.memory.strides == (8, 16, 32, 64)


# --- Hugging Face -----------------------------------------------------------------------------------------------------
def peer(folder: Path, untied: bool = False, **options: object) -> nn.Module:
    """Hugging Face's model with random weights, saved in a folder."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
    from transformers import ResNetConfig as Body

    stages = ["stage2", "stage3", "stage4"] if options.get("num_feature_levels", 4) > 1 else ["stage4"]
    body = Body(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", out_features=stages)
    small = {"encoder_layers": 1, "decoder_layers": 3, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5,
             "d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 4}
    torch.manual_seed(0)
    config = DeformableDetrConfig(backbone_config=body, disable_custom_kernels=True, auxiliary_loss=True,
                                  **{**small, **options})
    model = DeformableDetrForObjectDetection(config).eval()
    if untied:
        model.class_embed = nn.ModuleList(nn.Linear(64, 4) for _ in range(3))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    model.save_pretrained(folder)
    return model


SIDES = [(2, 75, 100), (1, 64, 96)]


def check_peer(folder: Path, theirs: nn.Module) -> DETR:
    """Ours, read from the folder in two ways, answers as theirs in every layer."""
    ours = pretrained_model(folder)
    again = load_pretrained(ours.config.build(4), folder).eval()
    for count, y, x in SIDES:
        pad = torch.zeros(count, y, x, dtype=torch.bool)
        pad[-1, 60:], pad[-1, :, 70:] = True, True
        images = pictures(count, y, x).masked_fill(pad[:, None], 0)
        with torch.no_grad():
            truth = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}] * count
            found = theirs(images, (~pad).long(), labels=truth)  # else it tells the last layer alone
            for model in (ours, again):
                out = model(images, pad)
                assert_close(out.logits[-1], found.logits, atol=5e-4, rtol=0)
                assert_close(out.boxes[-1], found.pred_boxes, atol=1e-4, rtol=0)
                assert len(found.auxiliary_outputs) == 2
                for i, layer in enumerate(found.auxiliary_outputs):
                    assert_close(out.logits[i], layer["logits"], atol=5e-4, rtol=0)
                    assert_close(out.boxes[i], layer["pred_boxes"], atol=1e-4, rtol=0)
        assert (found.logits[0, 0] - found.logits[0, 1]).abs().max() > 1e-2
    return ours


@pytest.mark.parametrize("options", [
    {}, {"num_feature_levels": 1}, {"num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 3},
    {"num_feature_levels": 5, "decoder_attention_heads": 4}, {"with_box_refine": True},
], ids=str)
def test_hugging_face_agrees(options, tmp_path):
    theirs = peer(tmp_path, **options)
    model = check_peer(tmp_path, theirs)
    assert type(model.config) is DeformableDETR and model.config.nheads == 4 and len(model.names) == 4
    assert model.config.with_box_refine == options.get("with_box_refine", False)
    assert model.config.num_feature_levels == options.get("num_feature_levels", 4)
    own = model.state_dict()
    in_memory = convert_names(theirs.state_dict(), own, sampled_layouts(model.config))  # other names than in files
    in_memory = adjust_state(model.config, in_memory)
    assert in_memory.keys() == own.keys()
    assert_close(in_memory, own, rtol=0, atol=0, check_dtype=False)


def test_hugging_face_agrees_where_heads_are_not_tied(tmp_path):
    """transformers#20461: heads that differ stay different; those that a file leaves out are the first."""
    theirs = peer(tmp_path, untied=True, with_box_refine=True)
    maps = check_peer(tmp_path, theirs).class_maps()
    assert len(maps) == 3 and not torch.equal(maps[0].weight, maps[1].weight)
    (tmp_path / "tied").mkdir()
    tied = peer(tmp_path / "tied", with_box_refine=True)
    first, *others = check_peer(tmp_path / "tied", tied).class_maps()
    assert all(torch.equal(first.weight, other.weight) and first is not other for other in others)


def test_heads_that_differ_do_not_fit_a_model_that_shares_one(tmp_path):
    peer(tmp_path, untied=True)
    with pytest.raises(ValueError, match="decoder.head.2.classes.* differ: in this model all layers share"):
        pretrained_model(tmp_path)


# --- the new parts ---------------------------------------------------------------------------------------------------
TINY = DeformableDETR(TinyConfig((16, 16, 16), (4, 8, 8)), 5, **{**SIZES, "hidden_dim": 32}, num_feature_levels=3,
                      num_backbone_outs=2)


def moving(config: DeformableDETR = TINY, spread: float = 0.2) -> DETR:
    """A model in which every cell and query looks elsewhere, and boxes move; always the same."""
    torch.manual_seed(0)
    model = config.build(3).eval()
    for part in model.modules():
        if isinstance(part, SampledAttention):
            nn.init.normal_(part.offsets.weight, std=spread)
            nn.init.normal_(part.scores.weight, std=0.2)
    for part in model.head_outputs():
        nn.init.normal_(part.weight, std=0.2)
    return model


def still(part: SampledAttention) -> None:
    """Let it read at its reference alone."""
    nn.init.zeros_(part.offsets.weight), nn.init.zeros_(part.offsets.bias)


@torch.no_grad()
def test_a_point_that_stays_reads_the_memory_between_cells():
    """One level, offsets of zero: the values at the reference, whatever the weights are."""
    torch.manual_seed(0)
    part, pad = SampledCrossAttention(32, 4, 1, 3), torch.zeros(2, 64, 96, dtype=torch.bool)
    still(part), nn.init.normal_(part.scores.weight)
    pad[1, 40:], pad[1, :, 56:] = True, True
    memory = replace(TINY, num_feature_levels=1).build(3).memory(pictures(), pad)
    content, place, ref = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.rand(2, 5, 2)
    found = part(content, QueryPosition(place, place), ref, memory)
    values = memory._replace(x=part.v(memory.x)).masked()
    places = 2 * (ref * memory.valid)[:, None] - 1  # b 1 q 2, in the padded grid
    read = nn.functional.grid_sample(values.grids()[0], places, align_corners=False)[:, :, 0].mT
    assert_close(found, part.out(read), atol=1e-5, rtol=1e-4)
    points, weights = part.look(content, QueryPosition(place, place), ref, memory)
    assert_close(points, ref[:, :, None, None, None].expand_as(points))
    assert_close(weights.sum((-2, -1)), torch.ones(2, 5, 4)) and weights.std() > 0.1


@torch.no_grad()
def neutral(plain: DETR) -> DETR:
    """A Deformable DETR that computes, on pictures of one cell, what this DETR computes."""
    config = replace(TINY, num_feature_levels=1)
    model = config.build(3).eval()
    model.memory.project[0] = plain.memory.project
    own = model.state_dict()
    same = {name: value for name, value in plain.state_dict().items()
            if name in own and own[name].shape == value.shape}
    rest = model.load_state_dict(same, strict=False).missing_keys
    new = r"attention\.(offsets|scores)|\.cross\.|queries|level_embed|project"
    assert all(re.search(new, name) for name in rest), rest
    nn.init.zeros_(model.memory.level_embed), nn.init.zeros_(model.queries.reference.weight)
    pos = plain.queries.embedding.weight
    model.queries.embedding.weight.copy_(torch.cat((pos, torch.zeros_like(pos)), 1))
    layers = zip(model.encoder.layers, plain.encoder.layers, strict=True)
    sampled = [(layer.attention, old.attention) for layer, old in layers]
    layers = zip(model.decoder.layers, plain.decoder.layers, strict=True)
    sampled += [(layer.cross, old.cross.attention) for layer, old in layers]
    for ours, theirs in sampled:
        still(ours)
        ours.v.load_state_dict(theirs.v.state_dict()), ours.out.load_state_dict(theirs.out.state_dict())
    return model


def test_neutralised_it_is_detr_on_a_picture_of_one_cell():
    torch.manual_seed(0)
    plain = FocalDETR(TINY.backbone, 5, **{**SIZES, "hidden_dim": 32}).build(3).eval()
    plain.decoder.norm = nn.Identity()
    nn.init.normal_(plain.head.boxes[-1].weight, std=0.2)
    model, small = neutral(plain), pictures(2, 8, 8)
    with torch.no_grad():
        assert plain.memory(small, torch.zeros(2, 8, 8) > 0).shapes == ((1, 1),)
        assert_close(model(small)[:3], plain(small)[:3], atol=1e-5, rtol=1e-4)
        assert (model(pictures()).logits - plain(pictures()).logits).abs().max() > 1e-3
        model.encoder.layers[0].attention.offsets.bias += 0.25  # reads beyond the cell
        assert (model(small).logits - plain(small).logits).abs().max() > 1e-3


def test_heads_start_on_a_star():
    part = SampledCellAttention(32, 8, 3, 4)
    offsets = part.offsets.bias.unflatten(0, (8, 3, 4, 2))
    assert_close(offsets[:, 0, 0], torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1],
                                                 [1, -1]]), atol=1e-6, rtol=0)
    for number in range(4):
        assert_close(offsets[:, :, number], (number + 1) * offsets[:, :, 0])
    assert not part.offsets.weight.any() and not part.scores.weight.any() and not part.scores.bias.any()


def test_a_box_gives_the_unit_of_its_offsets():
    """Half of a side for as many points as there are, as in the paper's appendix."""
    offsets, cells = torch.randn(1, 2, 4, 3, 5, 2), torch.tensor([[[12.0, 8], [6, 4], [3, 2]]])
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.1, 0.1]]])
    moved = sampling_points(box, offsets, cells) - box[:, :, None, None, None, :2]
    assert_close(moved, offsets / 5 * box[:, :, None, None, None, 2:] * 0.5)
    assert_close(sampling_points(box, offsets, 7 * cells), sampling_points(box, offsets, cells))
    point = sampling_points(box[..., :2], offsets, cells) - box[:, :, None, None, None, :2]
    assert_close(point, offsets / cells[:, None, None, :, None])


@pytest.mark.parametrize("refine", [False, True])
def test_references_move_only_where_they_are_refined(refine):
    model, refs = moving(replace(TINY, with_box_refine=refine)), []
    for layer in model.decoder.layers:
        layer.cross.register_forward_pre_hook(lambda part, given: refs.append(given[2]))
    out = model(pictures())
    first, second = refs
    assert first.shape[-1] == 2 and first.requires_grad
    if refine:
        assert torch.equal(second, out.boxes[0]) and not second.requires_grad
        assert len({id(part) for part in model.class_maps()}) == 2 and len(model.head_outputs()) == 4
    else:
        assert second is first and len(model.class_maps()) == 1


def test_first_boxes_are_small():
    for refine in (False, True):
        model = replace(TINY, with_box_refine=refine).build(3).eval()
        boxes = model(pictures()).boxes
        assert_close(boxes[..., 2:], torch.full_like(boxes[..., 2:], torch.tensor(-2.0).sigmoid().item()))


@pytest.mark.parametrize(("other", "words"), [
    ({"num_feature_levels": 4}, "num_feature_levels is 3 in the file and 4"), ({"nheads": 4}, "cross.offsets"),
    ({"num_queries": 10}, "num_queries is 5 in the file and 10"), ({"enc_n_points": 2}, "attention.offsets"),
    ({"dec_layers": 3}, "dec_layers is 2 in the file and 3"), ({"with_box_refine": True}, "unknown|missing"),
], ids=str)
def test_a_file_is_refused_by_a_model_of_other_options(other, words, tmp_path):
    torch.save({"model": TINY.build(3).state_dict()}, tmp_path / "tiny.pth")
    model = replace(TINY, **other).build(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"tiny.pth.*does not fit.*({words})"):
        load_pretrained(model, tmp_path / "tiny.pth")
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert load_pretrained(TINY.build(3), tmp_path / "tiny.pth")


# --- what every member must do: here what test_contract.py does not try -----------------------------------------------
@pytest.mark.parametrize("options", [
    {"num_feature_levels": 1}, {"num_feature_levels": 2, "num_backbone_outs": 1}, {"num_feature_levels": 5},
    {"enc_n_points": 1, "dec_n_points": 3}, {"pre_norm": True}, {"enc_layers": 0},
    {"with_box_refine": True, "pre_norm": True}, {"with_box_refine": True, "dec_layers": 1},
], ids=str)
def test_other_options_build_and_learn(options, tmp_path):
    model, targets = replace(TINY, **options).build(3), series(2, 1)
    targets = [targets[i][1] for i in range(2)]
    criterion = criterion_for(model)
    total = criterion.total(criterion(model(pictures()), targets))
    total.backward()
    assert total.isfinite()
    none = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert none == ({"memory.level_embed"} if not model.config.enc_layers else set())  # positions are the encoder's
    model.eval().save_pretrained(tmp_path)
    again = pretrained_model(tmp_path)
    assert again.config == model.config
    with torch.no_grad():
        assert_close(again(pictures())[:2], model(pictures())[:2])


def test_a_dilated_backbone_gives_one_fine_level():
    with torch.device("meta"):
        model = DeformableDETR(ResNetConfig("resnet50", True, pretrained=False), num_feature_levels=1).build(91)
    assert model.memory.strides == (16,) and model.memory.project[0][0].weight.shape == (256, 2048, 1, 1)


@pytest.mark.parametrize("size", [(4, 4), (7, 40), (8, 8)])
@pytest.mark.parametrize("refine", [False, True])
def test_pictures_smaller_than_a_cell_and_offsets_out_of_the_picture(size, refine):
    model = moving(replace(TINY, num_feature_levels=4, with_box_refine=refine), spread=50.0)
    with torch.no_grad(), capture_attention(model.attentions()) as seen:
        out = model(pictures(1, *size))
    assert out.logits.isfinite().all() and ((out.boxes >= 0) & (out.boxes <= 1)).all()
    points, weights = seen["cross"][0]
    assert ((points < 0) | (points > 1)).any() and weights.isfinite().all()
    targets = [Target(labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.4]]))]
    criterion = criterion_for(model)
    criterion.total(criterion(model(pictures(1, *size)), targets)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_weights_that_are_no_number_give_none():
    """Somebody's training broke: the result says so, and no index fails."""
    model = moving()
    model.encoder.layers[0].attention.offsets.weight.data[0, 0] = torch.nan
    with torch.no_grad():
        assert model(pictures()).logits.isnan().any()


def test_classes_and_queries_can_be_exchanged():
    for refine in (False, True):
        model = moving(replace(TINY, with_box_refine=refine))
        before = model.queries.embedding.weight.detach().clone()
        model = resize_queries(replace_head(model, 7, keep={4: 2}), 8, keep=[1, 0])
        with torch.no_grad():
            out = model(pictures())
        assert out.logits.shape == (2, 2, 8, 7) and model.config.num_queries == 8
        assert type(model.config) is DeformableDETR and model.config.with_box_refine == refine
        assert torch.equal(model.queries.embedding.weight[:2], before[[1, 0]])
        for part in model.class_maps():
            assert_close(part.bias[0], torch.tensor(SigmoidScores.start))
        assert len(model.postprocess(out, [(64, 96)] * 2)[0]["scores"]) == 56


def test_what_it_looks_at_are_points_of_the_picture():
    """`look` says what was read: the values at its points, weighted, are the answer."""
    model, pad = moving(replace(TINY, num_feature_levels=2)), torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 40:], pad[1, :, 56:] = True, True
    layer, given = model.encoder.layers[0].attention, []
    layer.register_forward_pre_hook(lambda part, inputs: given.append(inputs))
    with torch.no_grad(), capture_attention(model.attentions()) as seen:
        model(pictures(), pad)
        (x, memory), (points, weights) = given[0], seen["encoder"][0]
        q = x.shape[1]
        assert points.shape == (2, q, 2, 2, 4, 2) and weights.shape == (2, q, 2, 2, 4)
        assert seen["cross"][1][0].shape == (2, 5, 2, 2, 4, 2) and seen["queries"][0].shape == (2, 2, 5, 5)
        values = layer.v(x).masked_fill(memory.pad[..., None], 0).unflatten(-1, (2, -1))
        inside = points * memory.valid[:, None, None, :, None]
        found = sample_grids(values, memory.shapes, inside, weights)
        assert_close(layer.out(found), layer(x, memory), atol=1e-5, rtol=1e-4)
    centres = points.mean((2, 3, 4))[0, : memory.shapes[0][0] * memory.shapes[0][1]]
    assert (centres - memory.xy[0, : len(centres)]).abs().mean() < 0.3


def test_maps_of_all_cells_are_refused_with_advice():
    with pytest.raises(ValueError, match="collect .*`capture_attention`"):
        attention_maps(moving(), pictures())
    with pytest.raises(ValueError, match="looks at points, not at all cells"):
        attention_maps(moving(replace(TINY, num_feature_levels=1)), pictures())


def test_four_steps_move_every_part_and_it_comes_back(tmp_path):
    few = {"steps": 4, "batch_size": 4, "evaluations": 1, "log_every": 1, "scales": (), "progress": False}
    run = fit(TrainConfig(Drawn(), replace(TINY, with_box_refine=True), **few))
    torch.manual_seed(run.config.seed)
    fresh = dict(run.config.model.build(run.model.num_classes).named_parameters())
    still = {name for name, now in run.model.named_parameters() if torch.equal(now, fresh[name])}
    assert not [name for name in still if not name.endswith("attention.k.bias")], still
    run.model.eval().save_pretrained(tmp_path)
    again = pretrained_model(tmp_path)
    assert again.config == run.model.config and again.threshold == TINY.THRESHOLD
    with torch.no_grad():
        assert_close(again(pictures())[:2], run.model(pictures())[:2])
