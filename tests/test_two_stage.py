"""Two-stage Deformable DETR beside its authors' recorded outputs and Hugging Face's model; queries that are chosen."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from family import BATCHES, Member, pictures
from official import batch
from small_runs import Drawn, frozen_norms
from torch import Tensor, nn
from torch.testing import assert_close

from detr_nb.config import ConfigError
from detr_nb.family.two_stage import BoxProposals, TwoStageDETR, grid_boxes
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, ResNetConfig, TinyConfig
from detr_nb.notation import Memory, Output, Target
from detr_nb.pretrained import load_pretrained, pretrained_model
from detr_nb.training import TrainConfig, fit

NAME = "deformable_detr_two_stage_small"
BODY = ResNetConfig("resnet50", pretrained=False)
SMALL = TwoStageDETR(BODY, 20, dec_layers=2, enc_layers=2, dim_feedforward=128, dropout=0.0)
TINY = TwoStageDETR(TinyConfig((16, 16, 16), (4, 8, 8)), 5, hidden_dim=16, nheads=2, enc_layers=1, dec_layers=2,
                    dim_feedforward=16, dropout=0.0)
NOTHING = Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))


def truth() -> list[Target]:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4]])
    return [Target(labels=torch.tensor([1, 2]), boxes=boxes), Target(labels=torch.tensor([0]), boxes=boxes[1:])]


@cache
def lively() -> DETR:
    """A small model in which every part has a say."""
    torch.manual_seed(0)
    model = TINY.build(3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


# --- the authors ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> Member:
    """Read from their checkpoint."""
    return Member(NAME, SMALL, tmp_path_factory.mktemp(NAME))


@pytest.fixture(scope="module")
def ours(authors) -> DETR:
    """Our model with their weights."""
    return authors.model()


@pytest.fixture(scope="module")
def out(ours) -> Output:
    """What it says to the padded batch."""
    with torch.no_grad():
        return ours(*batch(*BATCHES[""]))


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


def test_what_the_cells_say_is_the_authors(authors, ours, out):
    assert_close(out.extra["proposals"].boxes[0], authors["enc_boxes"], atol=1e-4, rtol=0)
    with torch.no_grad():
        odd = ours(*batch(*BATCHES["odd/"]))
    assert_close(odd.extra["proposals"].boxes[0], authors["odd/enc_boxes"], atol=1e-4, rtol=0)


def test_losses_of_the_cells_are_the_authors(authors, ours, out):
    criterion, targets = criterion_for(ours), authors.targets()
    losses = criterion(out, targets)
    for name in ("loss_ce_enc", "loss_bbox_enc", "loss_giou_enc"):
        assert_close(losses[name], authors[f"loss/{name}"], rtol=1e-3, atol=1e-6)
    part = criterion.extra["proposals"]
    (found,) = part.matcher(out.extra["proposals"], part.prepare(targets))
    for i, pairs in enumerate(found):
        theirs = authors[f"match/enc/img{i}"]
        mine = torch.stack(pairs)
        assert torch.equal(mine[:, mine[0].argsort()], theirs[:, theirs[0].argsort()])


@pytest.mark.parametrize("key", BATCHES)
def test_no_cell_is_chosen_that_may_not_propose(ours, key):
    """Else the comparisons above would be blind: all such cells look alike."""
    with torch.no_grad():
        memory = ours.encoder(ours.memory(*batch(*BATCHES[key])))
        found, (_, proper) = ours.queries.propose(memory), grid_boxes(memory)
    chosen = torch.topk(found.logits[..., 0], 20, dim=1).indices
    assert proper.gather(1, chosen).all() and not proper.all()


def test_their_file_tells_what_it_holds(authors, ours):
    model = pretrained_model(authors.file)
    assert replace(model.config, dropout=0.0) == SMALL and model.num_classes == 91
    assert_close(model.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_the_full_model_is_as_large_as_the_authors_say():
    """41 million parameters."""
    with torch.device("meta"):
        model = TwoStageDETR(BODY).build(91)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 41
    assert model.queries.count == 300 and criterion_for(model).weights["loss_ce_enc"] == 2


# --- Hugging Face -----------------------------------------------------------------------------------------------------
def peer(folder: Path, **options: object) -> nn.Module:
    """Hugging Face's model with random weights, saved in a folder."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
    from transformers import ResNetConfig as Body

    body = Body(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic",
                out_features=["stage2", "stage3", "stage4"])
    small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 7,
             "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 4}
    torch.manual_seed(0)
    config = DeformableDetrConfig(
        backbone_config=body, use_timm_backbone=False, auxiliary_loss=False, disable_custom_kernels=True,
        with_box_refine=True, two_stage=True, two_stage_num_proposals=9, **small, **options)
    model = DeformableDetrForObjectDetection(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model.save_pretrained(folder)
    return model


def test_hugging_face_agrees(tmp_path):
    theirs, pad = peer(tmp_path), torch.zeros(2, 75, 100, dtype=torch.bool)
    pad[1, 60:], pad[1, :, 70:] = True, True
    ours = pretrained_model(tmp_path)
    again = load_pretrained(ours.config.build(4), tmp_path).eval()
    assert ours.config.num_queries == 9 and ours.config.nheads == 4 and type(ours.config) is TwoStageDETR
    images = pictures(2, 75, 100).masked_fill(pad[:, None], 0)
    with torch.no_grad():
        found = theirs(images, (~pad).long())
        for model in (ours, again):
            out = model(images, pad)
            assert_close(out.logits[-1], found.logits, atol=5e-4, rtol=0)
            assert_close(out.boxes[-1], found.pred_boxes, atol=1e-4, rtol=0)
            assert_close(out.extra["proposals"].logits[0], found.enc_outputs_class, atol=5e-4, rtol=0)


# --- proposals --------------------------------------------------------------------------------------------------------
def test_squares_stand_around_the_centres_of_the_picture():
    """Slowly: by loops over levels, rows and columns of the area that is picture."""
    model, pad = lively(), torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 40:], pad[1, :, 64:] = True, True
    with torch.no_grad():
        memory = model.memory(pictures(), pad, None)
    boxes, proper = grid_boxes(memory)
    place = 0
    for level, (rows, columns) in enumerate(memory.shapes):
        for image, grid in enumerate(memory.pad[:, place : place + rows * columns].unflatten(1, (rows, columns))):
            tall, wide = int((~grid[:, 0]).sum()), int((~grid[0]).sum())
            for y in range(tall):
                for x in range(wide):
                    here = image, place + y * columns + x
                    square = [(x + 0.5) / wide, (y + 0.5) / tall, 0.05 * 2**level, 0.05 * 2**level]
                    assert_close(boxes[here], torch.tensor(square))
                    assert proper[here] == all(0.01 < number < 0.99 for number in square)
        place += rows * columns
    assert not proper[memory.pad].any() and proper.any(1).all()


def test_a_cell_at_the_very_edge_may_not_propose():
    xy = torch.tensor([[[0.005, 0.5], [0.5, 0.5], [0.5, 0.995]]])
    blank = torch.zeros(1, 3, 8)
    memory = Memory(blank, blank, torch.zeros(1, 3, dtype=torch.bool), xy, ((1, 3),), ())
    assert grid_boxes(memory)[1].tolist() == [[False, True, False]]
    assert not grid_boxes(memory, side=1.0)[1].any()


def test_cells_that_may_not_propose_say_the_same_whatever_they_hold():
    queries = BoxProposals(2, 8, 3)
    x, pad = torch.randn(1, 4, 8), torch.tensor([[False, False, False, True]])
    xy = torch.tensor([[[0.3, 0.5], [0.6, 0.5], [0.999, 0.5], [0.5, 0.5]]])
    memory = Memory(x, x, pad, xy, ((1, 4),), ())
    with torch.no_grad():
        found = queries.propose(memory)
        again = queries.propose(memory._replace(x=torch.cat((x[:, :2], 9 * torch.randn(1, 2, 8)), 1)))
    assert_close(found, again, rtol=0, atol=0)
    assert (found.boxes[0, 2:] == 1).all() and torch.equal(found.logits[0, 2], found.logits[0, 3])


def test_an_image_in_which_no_cell_may_propose_still_gets_answers():
    model, images = lively(), pictures()
    with torch.no_grad():
        memory = model.encoder(model.memory(images, torch.zeros(2, 64, 96, dtype=torch.bool), None))
        memory = memory._replace(xy=torch.ones_like(memory.xy))
        out = model.decoder(model.queries(memory), memory)
    losses = criterion_for(model)(out, truth())
    assert out.logits.isfinite().all() and all(value.isfinite() for value in losses.values())


def test_more_queries_than_cells_are_refused_by_a_message_that_says_how_many_there_may_be():
    model = replace(TINY, num_queries=700).build(3).eval()
    cells = sum(rows * columns for rows, columns in model.memory(pictures(), torch.zeros(2, 64, 96) > 0, None).shapes)
    assert cells < 700
    with pytest.raises(ValueError, match=rf"have {cells} cells on all levels.*at most {cells}"), torch.no_grad():
        model(pictures())
    with torch.no_grad():
        assert resize_queries(model, cells)(pictures()).logits.shape[2] == cells


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="with_box_refine is False"):
        replace(TINY, with_box_refine=False)
    with pytest.raises(ValueError, match="at least one query"):
        BoxProposals(0, 8, 3)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_any_number_of_levels_proposes(levels):
    model = replace(TINY, num_feature_levels=levels).build(3).eval()
    with torch.no_grad():
        out = model(pictures())
    # the finest of the last three maps first, and one of half the size for each level that the backbone lacks
    cells = [16 * 24, 8 * 12, 8 * 12, 4 * 6, 2 * 3]
    used = cells[2:3] if levels == 1 else cells[1:3] if levels == 2 else cells
    assert out.logits.shape == (2, 2, 5, 3) and out.extra["proposals"].boxes.shape[2] == sum(used)
    losses = criterion_for(model)(out, truth())
    assert all(value.isfinite() for value in losses.values())


# --- the model --------------------------------------------------------------------------------------------------------
def reordered(order: Tensor):
    """`torch.topk` in which ranks change places."""
    topk = torch.topk

    def ranked(*arguments, **options):
        found = topk(*arguments, **options)
        return type(found)((found.values[:, order], found.indices[:, order]))

    return patch("torch.topk", ranked)


def test_ranks_that_change_places_change_the_places_of_the_answers():
    model, order = lively(), torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        before = model(pictures())
        with reordered(order):
            after = model(pictures())
    assert_close(after[:3], before.queries(order)[:3], atol=1e-5, rtol=1e-4)
    assert (after.logits - before.logits).abs().max() > 1e-3


def test_no_gradient_flows_from_the_second_stage_into_the_chosen_boxes():
    model = frozen_norms(TINY.build(3)).train()
    criterion = criterion_for(model)
    losses = criterion(model(pictures(), targets=truth()), truth())
    second = sum(value for name, value in losses.items() if name.startswith("loss") and "enc" not in name)
    grads = torch.autograd.grad(second, list(model.queries.head.parameters()), retain_graph=True, allow_unused=True)
    assert all(grad is None for grad in grads)
    first = sum(value for name, value in losses.items() if name.startswith("loss") and "enc" in name)
    assert all(grad is not None for grad in torch.autograd.grad(first, list(model.queries.head.parameters())))


def test_last_maps_of_both_stages_are_known():
    """Muon leaves them out."""
    model = lively()
    heads = [*model.decoder.head, model.queries.head]
    assert [*map(id, model.head_outputs())] == [id(part) for head in heads for part in (head.classes, head.boxes[-1])]


def test_the_first_stage_need_not_know_the_class():
    model = lively()
    out, other = model(pictures()), [Target({**one, "labels": (one["labels"] + 1) % 3}) for one in truth()]
    losses, changed = (criterion_for(model)(out, targets) for targets in (truth(), other))
    assert losses["loss_ce_enc"] == changed["loss_ce_enc"] and losses["loss_ce"] != changed["loss_ce"]


@pytest.mark.parametrize("targets", [[NOTHING, NOTHING], [NOTHING, truth()[0]]], ids=["none", "one"])
def test_images_without_objects_train(targets):
    model = TINY.build(3).train()
    criterion = criterion_for(model)
    losses = criterion(model(pictures(), targets=targets), targets)
    criterion.total(losses).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_saved_folder_loads_and_changes_classes_and_queries(tmp_path):
    before = lively()
    before.save_pretrained(tmp_path)
    model = pretrained_model(tmp_path)
    assert model.config == TINY
    with torch.no_grad():
        assert_close(model(pictures())[:2], before(pictures())[:2], rtol=0, atol=0)
        resize_queries(model, 3)
        assert_close(model(pictures()).extra["proposals"][:2], before(pictures()).extra["proposals"][:2])
        replace_head(model, 7, keep={4: 2})
        out = model(pictures())
    assert out.logits.shape == (2, 2, 3, 7) and out.extra["proposals"].logits.shape[-1] == 7
    assert model.num_classes == 7 and {len(table.weight) for table in model.class_maps()} == {7}
    assert_close(model.queries.head.classes.weight[4], before.queries.head.classes.weight[2])
    assert math.isfinite(criterion_for(model)(out, truth())["loss_ce_enc"])


def test_fit_trains_both_stages(tmp_path):
    run = fit(TrainConfig(Drawn(), TINY, steps=2, batch_size=4, evaluations=1, log_every=1, scales=(), progress=False))
    assert {"loss_ce_enc", "loss_bbox_enc", "loss_giou_enc"} <= run.history[-1].keys()
    assert all(math.isfinite(value) for value in run.history[-1].values() if isinstance(value, float))
