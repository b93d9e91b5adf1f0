"""Conditional DETR beside its authors' recorded outputs, Hugging Face's model, and DETR."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family import SIZES, Member, lively, pictures
from official import DATA, batch
from small_runs import Drawn
from torch import nn
from torch.testing import assert_close

from detr_nb.checkpoints import Checkpoint, rename
from detr_nb.family.conditional import (
    ConditionalDETR,
    ScaledQueryPosition,
    TwoPartAttention,
    TwoPartCrossAttention,
    conditional_layouts,
    read_conditional,
)
from detr_nb.family.focal import FocalDETR
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.insight import attention_maps
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, ResNetConfig, SigmoidScores, TinyConfig
from detr_nb.pretrained import convert_names, load_pretrained, pretrained_model
from detr_nb.training import TrainConfig, fit
from detr_nb.transformer import DenseCrossAttention, QueryPosition

NAME = "conditional_detr_small"
SMALL = ConditionalDETR(ResNetConfig("resnet18", pretrained=False), 20, dec_layers=3, enc_layers=2,
                        dim_feedforward=128, dropout=0.0)
TINY = ConditionalDETR(TinyConfig((16, 16, 16), (4, 8, 8)), 5, **SIZES)


# --- the authors ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> Member:
    """The authors' small model, read from their checkpoint once."""
    return Member(NAME, SMALL, tmp_path_factory.mktemp(NAME))


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


def test_references_are_the_authors(authors):
    model = authors.model()
    with torch.no_grad():
        memory = model.memory(*batch("image0_", (192, 256), (160, 224)))
        assert_close(model.queries(memory).ref, authors["reference_points"], atol=1e-5, rtol=0)


def test_gradients_are_the_authors(authors):
    """The size of the gradient of each parameter; the authors' stacked maps have those of their three parts."""
    model, targets = authors.model(), authors.targets()
    criterion = criterion_for(model)
    losses = criterion(model(*batch("image0_", (192, 256), (160, 224))), targets)
    ours = authors.gradient_norms(model, criterion.total(losses))
    names, (_, rules, _) = json.loads((DATA / f"{NAME}.json").read_text())["grad_names"], conditional_layouts(SMALL)
    for name, norm in zip(names, authors["grad_norms"], strict=True):
        stem, stacked, kind = rename(name, rules[1]).rpartition("in_proj_")
        parts = [f"{stem}{part}.{kind}" for part in "qkv"] if stacked else [kind]
        found = torch.tensor([ours.get(part, 0.0) for part in parts]).double().norm()
        assert_close(found, norm, rtol=1e-2, atol=1e-4, check_dtype=False, msg=lambda text, n=name: f"{n}: {text}")


def test_their_file_tells_what_it_holds(authors):
    model = pretrained_model(authors.file)
    assert replace(model.config, dropout=0.0) == SMALL and model.scores == SigmoidScores(100)
    assert model.threshold == ConditionalDETR.THRESHOLD
    assert_close(model.state_dict(), authors.model().state_dict(), rtol=0, atol=0)


def test_their_file_is_refused_by_a_model_of_other_options(authors):
    with pytest.raises(ValueError, match="does not fit"):
        load_pretrained(replace(SMALL, nheads=4).build(91), authors.file)


@pytest.mark.parametrize("name", ["detr_r18_small", "dab_detr_r18_small", "smca_r18_small_type3", "anchor_detr_small"])
def test_files_of_others_are_left_to_others(name):
    names = [row[0] for row in json.loads((DATA / f"{name}.json").read_text())["state"]]
    assert read_conditional(Checkpoint(dict.fromkeys(names, torch.empty(0)), {})) is None


def test_the_full_model_with_every_backbone():
    """Hugging Face's has as many parameters, dilated or not."""
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection
    from transformers import ResNetConfig as Body

    with torch.device("meta"):
        models = {body: ConditionalDETR(ResNetConfig(*body, pretrained=False)).build(91)
                  for body in (("resnet50",), ("resnet50", True), ("resnet101",))}
        config = ConditionalDetrConfig(backbone_config=Body(out_features=["stage4"]), use_timm_backbone=False,
                                       num_labels=91)
        theirs = ConditionalDetrForObjectDetection(config)
    counts = {body: sum(p.numel() for p in model.parameters()) for body, model in models.items()}
    assert counts["resnet50",] == counts["resnet50", True] == 43_418_401 < counts["resnet101",]
    assert counts["resnet50",] == sum(p.numel() for p in theirs.parameters())
    model = models["resnet50",]
    assert criterion_for(model).weights["loss_ce"] == 2 and model.scores.top == 100 and model.queries.count == 300
    assert model.backbone.strides[-1] == 32 and models["resnet50", True].backbone.strides[-1] == 16


# --- Hugging Face -----------------------------------------------------------------------------------------------------
def peer(folder: Path) -> nn.Module:
    """Hugging Face's model with random weights, saved in a folder."""
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection
    from transformers import ResNetConfig as Body

    body = Body(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", out_features=["stage4"])
    small = {"encoder_layers": 1, "decoder_layers": 3, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5,
             "d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 4}
    torch.manual_seed(0)
    config = ConditionalDetrConfig(backbone_config=body, use_timm_backbone=False, auxiliary_loss=False, **small)
    model = ConditionalDetrForObjectDetection(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    model.save_pretrained(folder)
    return model


def test_hugging_face_agrees(tmp_path):
    theirs, pad = peer(tmp_path), torch.zeros(2, 75, 100, dtype=torch.bool)
    pad[1, 60:], pad[1, :, 70:] = True, True
    ours = pretrained_model(tmp_path)
    again = load_pretrained(ours.config.build(4), tmp_path).eval()
    assert type(ours.config) is ConditionalDETR and ours.config.nheads == 4 and len(ours.names) == 4
    own = ours.state_dict()
    in_memory = convert_names(theirs.state_dict(), own, conditional_layouts(ours.config))  # other names than in files
    assert in_memory.keys() == own.keys()
    assert_close(in_memory, own, rtol=0, atol=0, check_dtype=False)
    images = pictures(2, 75, 100).masked_fill(pad[:, None], 0)
    with torch.no_grad():
        found = theirs(images, (~pad).long())
        for model in (ours, again):
            out = model(images, pad)
            assert_close(out.logits[-1], found.logits, atol=5e-4, rtol=0)
            assert_close(out.boxes[-1], found.pred_boxes, atol=1e-4, rtol=0)


# --- the new parts ---------------------------------------------------------------------------------------------------
def test_each_head_compares_its_own_parts():
    """Beside torch's attention of twice the width, whose maps are those of both parts, sorted by heads."""
    torch.manual_seed(0)
    part, memory = TwoPartCrossAttention(16, 4), TINY.build(3).memory(pictures(), torch.zeros(2, 64, 96) > 0, None)
    content, place = torch.randn(2, 2, 5, 16)
    q, k, _, _ = part.compare(content, QueryPosition(place, place), None, memory)
    plain = nn.functional.scaled_dot_product_attention(q, k, torch.eye(k.shape[2]).expand(2, 4, -1, -1))
    assert_close(part.look(content, QueryPosition(place, place), None, memory), plain)
    for h in range(4):
        cut = slice(4 * h, 4 * h + 4)
        assert_close(q[:, h], torch.cat((part.q(content)[..., cut], part.q_pos(place)[..., cut]), -1))
        assert_close(k[:, h], torch.cat((part.k(memory.x)[..., cut], part.k_pos(memory.pos)[..., cut]), -1))


def test_weights_are_dropped_in_training_only():
    torch.manual_seed(0)
    part, memory = TwoPartCrossAttention(16, 4, 0.5), TINY.build(3).memory(pictures(), torch.zeros(2, 64, 96) > 0, None)
    asked = torch.randn(2, 5, 16), QueryPosition(torch.randn(2, 5, 16), torch.randn(2, 5, 16)), None, memory
    assert (part.train()(*asked) - part(*asked)).abs().max() > 1e-3
    assert torch.equal(part.eval()(*asked), part(*asked))
    values = part.look(*asked) @ part.split(part.v(memory.x))
    assert_close(part(*asked), part.out(part.join(values)), atol=1e-5, rtol=1e-4)


def test_the_first_layer_does_not_scale_and_a_box_counts_by_its_centre():
    stands, content, box = ScaledQueryPosition(16), torch.randn(2, 4, 16), torch.rand(2, 4, 4)
    point = box[..., :2]
    plain, scaled = (stands.scaled(layer, content, box) for layer in (0, 1))
    assert_close(stands.scaled(0, content, point), plain), assert_close(stands.scaled(1, content, point), scaled)
    assert_close(scaled, plain * stands.scale(content))
    assert not torch.allclose(scaled, plain)


def take_over(part: TwoPartAttention, plain: nn.Module) -> None:
    """Give an attention in two parts the weights of DETR's, for content and place."""
    for name in "qkv":
        getattr(part, name).load_state_dict(getattr(plain, name).state_dict())
    part.out.load_state_dict(plain.out.state_dict())
    for place, name in ((part.q_pos, "q"), (part.k_pos, "k")):
        place.weight.copy_(getattr(plain, name).weight), place.bias.zero_()


@torch.no_grad()
def neutral(plain: DETR, scale: float = 2**0.5) -> DETR:
    """A conditional DETR that computes what this DETR computes."""
    model = TINY.build(3).eval()
    rest = model.load_state_dict(plain.state_dict(), strict=False)
    assert all(".cross." in name for name in rest.unexpected_keys)
    nn.init.zeros_(model.queries.reference[-1].weight), nn.init.zeros_(model.queries.reference[-1].bias)
    for ours, theirs in zip(model.decoder.layers, plain.decoder.layers, strict=True):
        take_over(ours.attention, theirs.attention)
        ours.cross = TwoPartCrossAttention(16, 2, add_position=True)
        take_over(ours.cross, theirs.cross.attention)
        ours.cross.q_added.load_state_dict(ours.cross.q_pos.state_dict())
        for part in (ours.cross.q.weight, ours.cross.q.bias, ours.cross.q_added.weight):
            part *= scale  # heads are twice as wide, with zeros in one half
        ours.cross.q_pos.weight.zero_()
    return model


def test_neutralised_it_is_detr():
    torch.manual_seed(0)
    plain, pad = FocalDETR(TINY.backbone, 5, **SIZES).build(3).eval(), torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 40:] = True
    for layer in plain.decoder.layers:
        layer.cross.attention.q.weight.data *= 5  # looks that are not flat
    with torch.no_grad():
        wanted, found, wrong = (model(pictures(), pad) for model in (plain, neutral(plain), neutral(plain, 1)))
    assert_close(found[:3], wanted[:3], atol=1e-5, rtol=1e-4)
    assert (wrong.logits - wanted.logits).abs().max() > 1e-3
    assert isinstance(plain.decoder.layers[0].cross, DenseCrossAttention)


def test_all_layers_look_from_the_same_point():
    model, refs = lively(TINY), []
    model.decoder.query_position.register_forward_pre_hook(lambda part, given: refs.append(given[3]))
    with torch.no_grad():
        out = model(pictures())
        asked = model.queries(model.memory(pictures(), torch.zeros(2, 64, 96) > 0, None))
        wanted = (model.head.boxes(out.content)[..., :2] + asked.ref.logit()).sigmoid()
    assert len(refs) == 2 and all(torch.equal(ref, asked.ref) for ref in refs)
    assert_close(out.boxes[..., :2], wanted)


# --- what every member must do: here what test_contract.py does not try -----------------------------------------------
def test_four_steps_move_every_part_and_it_comes_back(tmp_path):
    few = {"steps": 4, "batch_size": 4, "evaluations": 1, "log_every": 1, "scales": (), "progress": False}
    run = fit(TrainConfig(Drawn(), TINY, **few))
    torch.manual_seed(run.config.seed)
    fresh = dict(run.config.model.build(run.model.num_classes).named_parameters())
    still = {name for name, now in run.model.named_parameters() if torch.equal(now, fresh[name])}
    blind = r"\.k(_pos)?\.bias$|^decoder\.layers\.0\.attention\.[qkv]\.weight$"  # softmax is; content starts at zero
    assert not [name for name in still if not re.search(blind, name)]
    run.model.eval().save_pretrained(tmp_path)
    again = pretrained_model(tmp_path)
    assert again.config == TINY and again.threshold == TINY.THRESHOLD
    with torch.no_grad():
        assert_close(again(pictures())[:2], run.model(pictures())[:2])


def test_classes_and_queries_can_be_exchanged():
    model = lively(TINY)
    with torch.no_grad():
        before = model.queries(model.memory(pictures(), torch.zeros(2, 64, 96) > 0, None)).ref
    model = resize_queries(replace_head(model, 7, keep={4: 2}), 8, keep=[1, 0])
    with torch.no_grad():
        out = model(pictures())
        after = model.queries(model.memory(pictures(), torch.zeros(2, 64, 96) > 0, None)).ref
    assert out.logits.shape == (2, 2, 8, 7) and model.config.num_queries == 8 and type(model.config) is ConditionalDETR
    assert_close(after[:, :2], before[:, [1, 0]])
    assert_close(model.decoder.head.classes.bias[0], torch.tensor(SigmoidScores.start))
    assert len(model.postprocess(out, [(64, 96)] * 2)[0]["scores"]) == 56


def test_it_is_drawn_by_insight():
    maps = attention_maps(lively(TINY), pictures())
    assert maps.cross.shape == (2, 2, 2, 5, 96) and maps.queries.shape == (2, 2, 2, 5, 5)
    assert_close(maps.cross.sum(-1), torch.ones(2, 2, 2, 5))
