"""DAB-DETR beside its authors' recorded outputs, Hugging Face's model, and Conditional DETR."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from family import SIZES, Member, lively, pictures
from small_runs import Drawn, frozen_norms
from torch import nn
from torch.testing import assert_close

from detr_nb.family.conditional import ConditionalDETR, ScaledQueryPosition
from detr_nb.family.dab import DABDETR, BoxQueryPosition, ScaledEncoder
from detr_nb.family.references import ReferenceHead
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.insight import attention_maps
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, ResNetConfig, SigmoidScores, TinyConfig
from detr_nb.notation import Target
from detr_nb.pretrained import load_pretrained, pretrained_model
from detr_nb.training import TrainConfig, fit
from detr_nb.transformer import Encoder, EncoderLayer

NAME = "dab_detr_r18_small"
BODY = ResNetConfig("resnet18", pretrained=False)
SMALL = DABDETR(BODY, 20, dec_layers=3, enc_layers=2, dim_feedforward=128, dropout=0.0)
TINY = DABDETR(TinyConfig((16, 16, 16), (4, 8, 8)), 5, **SIZES)


# --- the authors ----------------------------------------------------------------------------------------------------
class Authors(Member):
    """The authors' small model; they keep as many answers as an option says."""

    def model(self) -> DETR:
        """Ours with the authors' weights and number of answers."""
        model = super().model()
        model.scores = SigmoidScores(self.args["num_select"])
        return model


@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> Authors:
    """Read from their checkpoint."""
    return Authors(NAME, SMALL, tmp_path_factory.mktemp(NAME))


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


def test_their_file_tells_what_it_holds(authors):
    model = pretrained_model(authors.file)
    assert replace(model.config, dropout=0.0) == SMALL and model.scores == SigmoidScores(300)
    assert_close(model.state_dict(), authors.model().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"temperature": 10000}, {"prelu": False}, {"nheads": 4}, {"num_patterns": 2}])
def test_their_file_is_refused_by_a_model_of_other_options(authors, changes):
    with pytest.raises(ValueError, match="does not fit"):
        load_pretrained(replace(SMALL, **changes).build(91), authors.file)


def test_the_full_model_is_as_large_as_the_authors_say():
    """44 million parameters."""
    with torch.device("meta"):
        model = DABDETR(ResNetConfig(pretrained=False)).build(91)
        dilated = DABDETR(ResNetConfig(dilation=True, pretrained=False), num_patterns=3).build(91)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6) == 44
    assert sum(p.numel() for p in dilated.parameters()) == count + 3 * 256
    assert criterion_for(model).weights["loss_ce"] == 1 and model.scores.top == 300


# --- Hugging Face -----------------------------------------------------------------------------------------------------
def peer(folder: Path, **options: object) -> nn.Module:
    """Hugging Face's model with random weights, saved in a folder."""
    from transformers import DabDetrConfig, DabDetrForObjectDetection
    from transformers import ResNetConfig as Body

    body = Body(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", out_features=["stage4"])
    small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5,
             "hidden_size": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 4}
    torch.manual_seed(0)
    config = DabDetrConfig(backbone_config=body, use_timm_backbone=False, auxiliary_loss=False, **small, **options)
    model = DabDetrForObjectDetection(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.PReLU):
            nn.init.normal_(module.weight, std=0.3)
    model.model.decoder.bbox_embed.load_state_dict(model.bbox_predictor.state_dict())
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", [{}, {"num_patterns": 2}, {"activation_function": "relu"},
                                     {"random_refpoints_xy": True}], ids=str)
def test_hugging_face_agrees(tmp_path, options):
    theirs, pad = peer(tmp_path, **options), torch.zeros(2, 75, 100, dtype=torch.bool)
    pad[1, 60:], pad[1, :, 70:] = True, True
    ours = pretrained_model(tmp_path)
    again = load_pretrained(ours.config.build(4), tmp_path).eval()
    assert ours.config.num_patterns == options.get("num_patterns", 0) and ours.config.nheads == 4
    assert ours.config.prelu == ("activation_function" not in options)
    assert ours.config.random_refpoints_xy == ("random_refpoints_xy" in options)
    images = pictures(2, 75, 100).masked_fill(pad[:, None], 0)
    with torch.no_grad():
        found = theirs(images, (~pad).long())
        for model in (ours, again):
            out = model(images, pad)
            assert_close(out.logits[-1], found.logits, atol=5e-4, rtol=0)
            assert_close(out.boxes[-1], found.pred_boxes, atol=1e-4, rtol=0)


# --- the new parts ---------------------------------------------------------------------------------------------------
def test_a_position_that_wants_what_it_has_is_conditional_detrs():
    position = BoxQueryPosition(16)
    plain = ScaledQueryPosition(16)
    plain.scale.load_state_dict(position.scale.state_dict())
    nn.init.zeros_(position.size[-1].weight), nn.init.zeros_(position.size[-1].bias)
    content, ref = torch.randn(2, 4, 16), torch.rand(2, 4, 4)
    ref[..., 2:] = 0.5
    for layer in (0, 1):
        assert_close(position.scaled(layer, content, ref), plain.scaled(layer, content, ref))
    ref[..., 2] = 0.25  # half as wide: x doubles, y stays
    y, x = position.scaled(1, content, ref).chunk(2, -1)
    plain_y, plain_x = plain.scaled(1, content, ref).chunk(2, -1)
    assert_close(y, plain_y), assert_close(x, 2 * plain_x)


def test_an_encoder_that_scales_by_one_is_detrs():
    plain = Encoder([EncoderLayer(16, 2, 32) for _ in range(2)], nn.LayerNorm(16))
    scaled, memory = ScaledEncoder(plain, 16), TINY.build(3).memory(pictures(), torch.zeros(2, 64, 96) > 0, None)
    assert (scaled(memory).x - plain(memory).x).abs().max() > 0.01
    nn.init.zeros_(scaled.scale[-1].weight), nn.init.ones_(scaled.scale[-1].bias)
    assert_close(scaled(memory).x, plain(memory).x)
    assert scaled(memory).pos is memory.pos


def test_neutralised_it_is_conditional_detr():
    dab = lively(replace(TINY, prelu=False))
    nn.init.zeros_(dab.encoder.scale[-1].weight), nn.init.ones_(dab.encoder.scale[-1].bias)
    size, head = dab.decoder.query_position.size[-1], ReferenceHead(16, 3)
    nn.init.zeros_(size.weight), nn.init.zeros_(size.bias)
    dab.queries.references.weight.data[:, 2:] = 0
    dab.decoder.head = head
    point = ConditionalDETR(TINY.backbone, 5, **SIZES, temperature=20).build(3).eval()
    known = point.state_dict().keys()
    rest = point.load_state_dict({k: v for k, v in dab.state_dict().items() if k in known}, strict=False)
    assert not rest.unexpected_keys and all(name.startswith("queries.") for name in rest.missing_keys)
    with torch.no_grad():
        memory = dab.encoder(dab.memory(pictures(), torch.zeros(2, 64, 96) > 0, None))
        again = point.encoder(point.memory(pictures(), torch.zeros(2, 64, 96) > 0, None))
        assert_close(again.x, memory.x)
        asked = dab.queries(memory)
        own = dab.decoder.query_position(0, asked.content, None, asked.ref, memory).own
        theirs = point.decoder(asked._replace(pos=own, ref=asked.ref[..., :2]), again)
        ours = dab.decoder(asked, memory)
    assert_close(ours.logits, theirs.logits), assert_close(ours.content, theirs.content)
    assert_close(ours.boxes[..., :2], theirs.boxes[..., :2])


def test_an_empty_box_harms_nobody():
    model = lively(TINY)
    memory = model.encoder(model.memory(pictures(), torch.zeros(2, 64, 96) > 0, None))
    asked = model.queries(memory)
    ref = asked.ref.detach().clone()
    ref[:, 0] = 0
    out = model.decoder(asked._replace(ref=ref.requires_grad_()), memory)
    out.boxes.sum().backward()
    assert out.logits.isfinite().all() and ref.grad.isfinite().all()


def test_centres_that_are_fixed_stay(tmp_path):
    torch.manual_seed(0)
    model = replace(TINY, num_queries=400, random_refpoints_xy=True).build(3)
    centres, sides = model.queries.places().split(2, -1)
    assert centres.min() > 0 and (centres.histc(4, 0, 1) / 800 - 0.25).abs().max() < 0.06, "spread evenly"
    model(pictures())[1].sum().backward()
    grad = model.queries.references.weight.grad
    assert grad[:, :2].abs().max() == 0 and grad[:, 2:].abs().max() > 0
    before = model.queries.references.weight.detach().clone()
    resize_queries(model, 402)
    assert model.queries.fixed == 2
    assert_close(model.queries.references.weight[:400], before)


# --- what every member must do ----------------------------------------------------------------------------------------
@cache
def trained() -> DETR:
    """The model of a run of four steps."""
    few = {"steps": 4, "batch_size": 4, "evaluations": 1, "log_every": 1, "scales": (), "progress": False}
    run = fit(TrainConfig(Drawn(), replace(TINY, num_patterns=2), **few))
    torch.manual_seed(run.config.seed)
    fresh = dict(run.config.model.build(run.model.num_classes).named_parameters())
    still = {name for name, now in run.model.named_parameters() if torch.equal(now, fresh[name])}
    assert not {name for name in still if not name.endswith("k.bias")}, still
    assert 0 <= run.metrics["AP"] <= 1
    return run.model.eval()


def test_it_trains_and_comes_back(tmp_path):
    trained().save_pretrained(tmp_path)
    again = pretrained_model(tmp_path)
    assert again.config == trained().config and again.threshold == TINY.THRESHOLD
    with torch.no_grad():
        assert_close(again(pictures())[:2], trained()(pictures())[:2])


def test_pictures_without_objects_train_every_part():
    model = frozen_norms(lively(TINY)).train()
    nothing = [Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))] * 2
    criterion = criterion_for(model)
    total = criterion.total(criterion(model(pictures(), targets=nothing), nothing))
    total.backward()
    assert total.isfinite()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_classes_and_queries_can_be_exchanged():
    model = resize_queries(replace_head(lively(TINY), 7, keep={4: 2}), 8, keep=[1, 0])
    with torch.no_grad():
        out = model(pictures())
    assert out.logits.shape == (2, 2, 8, 7) and model.config.num_queries == 8
    assert_close(model.decoder.head.classes.bias[0], torch.tensor(SigmoidScores.start))
    assert len(model.postprocess(out, [(64, 96)] * 2)[0]["scores"]) == 56


def test_it_is_drawn_by_insight():
    maps = attention_maps(lively(TINY), pictures())
    assert maps.cross.shape == (2, 2, 2, 5, 96) and maps.queries.shape == (2, 2, 2, 5, 5)
    assert_close(maps.cross.sum(-1), torch.ones(2, 2, 2, 5))
