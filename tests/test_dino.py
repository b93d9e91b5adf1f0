"""DINO beside its authors' recorded outputs, a training step with their draws among them; its parts one by one."""

import json
import math
import os
import re
import signal
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from family import BATCHES, NoisedMember, pictures
from official import DATA, batch
from small_runs import frozen_norms, series
from test_two_stage import NOTHING, reordered, truth
from torch import Tensor
from torch.testing import assert_close

from detr_nb.boxes import cxcywh_to_xyxy
from detr_nb.checkpoints import rename
from detr_nb.config import ConfigError
from detr_nb.family.denoising import NoisedQueries
from detr_nb.family.dino import DINO, BoxPosition, ContrastiveNoise, dino_layouts
from detr_nb.family.focal import focal_loss
from detr_nb.family.references import ReferenceQueries, RefiningHead
from detr_nb.family.two_stage import TwoStageDETR, grid_boxes
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.loading import DataConfig, MemoryDataset
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, Draws, RecordedDraws, ResNetConfig, TinyConfig
from detr_nb.notation import Memory, Prediction
from detr_nb.pretrained import load_pretrained, pretrained_model
from detr_nb.training import TrainConfig, fit

NAME = "dino_small"
BODY = ResNetConfig("resnet50", pretrained=False)
SMALL = DINO(BODY, 30, dec_layers=2, enc_layers=2, dim_feedforward=128, dn_number=50)
TINY = DINO(TinyConfig((16, 16, 16), (4, 8, 8)), 5, hidden_dim=16, nheads=2, enc_layers=1, dec_layers=2,
            dim_feedforward=16, dn_number=3)


@cache
def lively() -> DETR:
    """A small model in which every part has a say."""
    torch.manual_seed(0)
    model = TINY.build(3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def copy_of(model: DETR) -> DETR:
    """The same, to be changed."""
    return deepcopy(model)


# --- the authors ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> NoisedMember:
    """Read from their checkpoint."""
    return NoisedMember(NAME, SMALL, tmp_path_factory.mktemp(NAME))


@pytest.fixture(scope="module")
def ours(authors) -> DETR:
    """Our model with their weights."""
    return authors.model()


@pytest.fixture(scope="module")
def trained(authors):
    """Our model, what it says in training, and its losses."""
    model = authors.model().train()
    out = model(*batch(*BATCHES[""]), targets=authors.targets())
    return model, out, criterion_for(model)(out, authors.targets())


def check_matches(ours: list, theirs: list[Tensor]) -> None:
    """The same pairs in any order."""
    for pairs, their in zip(ours, theirs, strict=True):
        found = torch.stack(pairs)
        assert torch.equal(found[:, found[0].argsort()], their[:, their[0].argsort()])


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    """Those of an evaluation: the chosen cells are judged, and there are no noised queries."""
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


@pytest.fixture(scope="module")
def memories(ours) -> dict[str, Memory]:
    """What the encoder makes of each batch."""
    with torch.no_grad():
        return {key: ours.encoder(ours.memory(*batch(*BATCHES[key]))) for key in BATCHES}


@pytest.mark.parametrize("key", BATCHES)
def test_chosen_cells_are_the_authors(authors, ours, memories, key):
    memory, chooser = memories[key], ours.queries.queries
    with torch.no_grad():
        found, asked = chooser.propose(memory), chooser(memory)
    score, cells = torch.topk(found.logits.amax(-1), 30, dim=1)
    start, proper = grid_boxes(memory)
    assert torch.equal(cells, authors[f"{key}enc_topk"])
    assert_close(score, authors[f"{key}enc_topk_scores"], atol=5e-4, rtol=0)
    # cells that may not propose look alike: were one chosen, this test would be blind
    assert proper.gather(1, cells).all() and not proper.all()
    assert_close(start.take_along_dim(cells[..., None], 1), authors[f"{key}interm_proposals"], atol=1e-6, rtol=0)
    assert_close(asked.proposals.logits, authors[f"{key}interm_logits"], atol=5e-4, rtol=0)
    assert_close(asked.proposals.boxes, authors[f"{key}interm_boxes"], atol=1e-4, rtol=0)
    assert torch.equal(asked.ref, asked.proposals.boxes) and not asked.ref.requires_grad


def test_their_file_tells_what_it_holds(authors):
    model = pretrained_model(authors.file)
    assert model.config == SMALL and model.num_classes == 91
    assert_close(model.state_dict(), authors.model().state_dict(), rtol=0, atol=0)


def test_noised_queries_are_the_authors(authors, ours, memories):
    order = authors.order()
    with torch.no_grad():
        asked = ours.queries(memories[""], authors.targets())
    noised = int(authors["dn/pad_size"])
    assert_close(asked.ref[:, order][:, :noised], authors["dn/query_boxes_unsigmoid"].sigmoid(), atol=1e-6, rtol=0)
    label_sum = asked.content[:, order][:, :noised].sum(-1)
    assert_close(label_sum, authors["dn/query_label_sum"], atol=1e-4, rtol=0)
    assert torch.equal(asked.self_mask[0, 0][order][:, order] == -math.inf, authors["dn/attn_mask"])
    (group,) = asked.groups
    assert group.repeats == int(authors["dn/num_groups"])


def test_both_parts_of_a_training_step_are_the_authors(authors, trained):
    _, out, _ = trained
    for part, key in ((out, "train/"), (out.extra["dn"], "dn/")):
        assert_close(part.logits[-1], authors[f"{key}pred_logits"], atol=5e-4, rtol=0)
        assert_close(part.boxes[-1], authors[f"{key}pred_boxes"], atol=1e-4, rtol=0)
        assert_close(part.boxes[:-1], authors[f"{key}aux_boxes"], atol=1e-4, rtol=0)
    assert_close(out.extra["dn"].logits[:-1], authors["dn/aux_logits"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("key", ["train/", ""])
def test_all_their_losses_are_ours(authors, ours, memories, trained, key):
    """By their names; without noised queries theirs are 0, and ours are not there."""
    losses = trained[2]
    if not key:
        with torch.no_grad():
            out = ours.decoder(ours.queries(memories[""]), memories[""])
            losses = criterion_for(ours)(out, authors.targets())
    checked = 0
    for name, value in authors.under(f"{key}loss/").items():
        if name.startswith(("loss_ce", "loss_bbox", "loss_giou")):
            assert_close(losses.get(name, torch.tensor(0.0)), value, rtol=1e-3, atol=1e-6)
            checked += name in losses
    assert checked == (15 if key else 9)
    assert_close(criterion_for(ours).total(losses), authors[f"{key}total_loss"], rtol=1e-3, atol=1e-6)


def test_all_their_matches_are_ours(authors, trained):
    model, out, _ = trained
    criterion, targets = criterion_for(model), authors.targets()
    for ours, theirs in zip(criterion.matcher(out, targets), authors.matches("train/"), strict=True):
        check_matches(ours, theirs)
    (chosen,) = criterion.extra["proposals"].matcher(out.extra["proposals"], targets)
    check_matches(chosen, [authors[f"match/interm/img{i}"] for i in range(2)])


def test_gradients_of_a_training_step_are_the_authors(authors, trained):
    model, _, losses = trained
    ours = authors.gradient_norms(model, criterion_for(model).total(losses))
    names = json.loads((DATA / f"{NAME}.json").read_text())["grad_names"]
    rules = dict(dino_layouts(SMALL))[next(sign for sign, rules in dino_layouts(SMALL) if rules)]
    for name, norm in zip(names, authors["train/grad_norms"], strict=True):
        ours_of = re.sub(r"head\.0\.", "head.", rename(name, rules))  # one for all layers
        stem, stacked, kind = ours_of.rpartition("in_proj_")
        parts = [f"{stem}{part}.{kind}" for part in "qkv"] if stacked else [kind]
        found = torch.tensor([ours.get(part, 0.0) for part in parts]).double().norm()
        told = {"check_dtype": False, "msg": lambda text, name=name: f"{name}: {text}"}
        assert_close(found, norm, rtol=1e-2, atol=1e-4, **told)


def test_the_full_model_is_as_large_as_the_authors_say():
    """47 million parameters."""
    with torch.device("meta"):
        model = DINO(BODY).build(91)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 47
    assert model.queries.count == 900 and model.scores.top == 300
    assert len(criterion_for(model).weights) == 3 * (6 + 6 + 1)


def test_losses_weigh_what_they_weigh_with_the_authors(ours):
    theirs = json.loads((DATA / f"{NAME}.json").read_text())["loss_weights"]
    assert criterion_for(ours).weights == theirs


def test_five_levels_are_four_of_the_backbone_and_one_more():
    """As in the authors' larger model: strides 4 to 64."""
    with torch.device("meta"):
        model = DINO(BODY, num_feature_levels=5, num_backbone_outs=4).build(91)
    assert model.memory.strides == (4, 8, 16, 32, 64) and model.memory.level_embed.shape == (5, 256)
    assert [part[0].weight.shape[-1] for part in model.memory.project] == [1, 1, 1, 1, 3]


def test_heads_of_a_file_that_differ_from_layer_to_layer_are_refused(authors, tmp_path):
    """Here all layers share one head."""
    saved = torch.load(authors.file, weights_only=False)
    saved["model"]["class_embed.1.bias"] = saved["model"]["class_embed.1.bias"] + 1
    saved["model"]["transformer.decoder.class_embed.1.bias"] = saved["model"]["class_embed.1.bias"]
    torch.save(saved, tmp_path / "other.pth")
    with torch.device("meta"):
        model = SMALL.build(91)
    with pytest.raises(ValueError, match="differ"):
        load_pretrained(model, tmp_path / "other.pth")


@pytest.mark.parametrize("changes", [{"temperature": 10000}, {"nheads": 4}, {"num_queries": 40}])
def test_their_file_is_refused_by_a_model_of_other_options(authors, changes):
    with pytest.raises(ValueError, match="does not fit"):
        load_pretrained(replace(SMALL, **changes).build(91), authors.file)


# --- contrastive denoising --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("number", "largest", "groups"), [(100, 7, 14), (100, 1, 100), (100, 101, 1), (50, 5, 10),
                                                           (49, 5, 98), (1, 5, 2), (100, 0, 1), (1, 0, 1)])
def test_groups_are_as_many_as_the_authors_make(number, largest, groups):
    assert ContrastiveNoise(4, 8, number, 0.5, 0.4).groups(largest) == groups


def test_corners_of_copies_to_repair_move_less_and_those_to_refuse_move_more():
    noise, boxes = ContrastiveNoise(4, 8, 50, 0.5, 0.4), torch.tensor([[0.5, 0.5, 0.2, 0.4]]).repeat(1000, 1)
    copy = torch.arange(1000) % 2
    torch.manual_seed(0)
    labels, moved = noise.noised(torch.zeros(1000, dtype=torch.int64), boxes, copy, Draws())
    far = (cxcywh_to_xyxy(moved) - cxcywh_to_xyxy(boxes)).abs() / torch.tensor([0.1, 0.2, 0.1, 0.2]) / 0.4
    near = copy == 0
    assert (far[near] <= 1.001).all() and (far[~near] >= 0.999).all() and far.max() > 1.9
    assert 0.15 < (labels != 0).float().mean() < 0.22  # a quarter is drawn, and one in four of those stays


def test_at_full_scale_boxes_stay_legal():
    noise, boxes = ContrastiveNoise(4, 8, 50, 1.0, 1.0), torch.rand(500, 4)
    asked = NoisedQueries(ReferenceQueries(3, 8), noise)
    targets = [{"labels": torch.zeros(500, dtype=torch.int64), "boxes": boxes}]
    blank = torch.zeros(1, 1, 8)
    memory = Memory(blank, blank, blank[..., 0].bool(), blank[..., :2], ((1, 1),), ())
    ref = asked(memory, targets).ref
    assert ref.isfinite().all() and (ref >= 9e-4).all() and (ref <= 1 - 9e-4).all()


def test_answers_are_blind_to_the_truth_and_equal_to_those_of_inference():
    model, pad = frozen_norms(copy_of(lively())), torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 40:] = True
    with torch.no_grad():
        alone = model.eval()(pictures(), pad)
        assert alone.extra.keys() == {"proposals"}
        for targets in (truth(), truth()[::-1], [NOTHING, NOTHING]):
            together = model.train()(pictures(), pad, targets=targets)
            assert_close(together.logits, alone.logits, rtol=1e-4, atol=1e-4)
            assert_close(together.boxes, alone.boxes, rtol=1e-4, atol=1e-4)
        memory = model.encoder(model.memory(pictures(), pad))
        leaking = model.decoder(model.queries(memory, truth())._replace(self_mask=None), memory)
    assert (leaking.logits - alone.logits).abs().max() > 1e-3


def test_copies_to_refuse_and_empty_slots_learn_no_class():
    """The class loss counts all slots, that of the boxes the first copies only."""
    model = copy_of(lively())
    model.queries.draws = RecordedDraws(label_p=torch.ones(36), label_new=torch.zeros(36, dtype=torch.int64),
                                        box_sign=torch.ones(36, 4, dtype=torch.int64), box_u=torch.full((36, 4), 0.5))
    part = model.train()(pictures(), targets=truth()).extra["dn"]
    judge = criterion_for(model).extra["dn"]
    losses = judge(part, truth())
    by, far, wrong = 3 * 6, torch.zeros(()), torch.zeros(part.logits.shape[1:])
    for image, target in enumerate(truth()):
        for group in range(6):
            for place, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                slot = 4 * group + place
                far = far + (part.boxes[-1, image, slot] - box).abs().sum()
                wrong[image, slot, label] = 1
    assert_close(losses["loss_bbox"], far / by)
    assert_close(losses["loss_ce"], focal_loss(part.logits[-1], wrong).sum() / by)


# --- mixed selection, and where queries stand -------------------------------------------------------------------------
def test_ranks_that_change_places_with_their_contents_change_the_places_of_the_answers():
    model, order = copy_of(lively()), torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        before = model(pictures())
        model.queries.resize(5, order.tolist())
        assert (model(pictures()).logits - before.queries(order).logits).abs().max() > 1e-4  # contents alone
        with reordered(order):
            after = model(pictures())
    assert_close(after[:3], before.queries(order)[:3], atol=1e-5, rtol=1e-4)


def test_a_query_stands_at_its_box_in_the_padded_picture():
    position, ref, content = BoxPosition(8), torch.rand(1, 3, 4), torch.zeros(1, 3, 8)
    blank = torch.zeros(1, 1, 8)
    memory = Memory(blank, blank, blank[..., 0].bool(), blank[..., :2], ((1, 1),), ())
    half = memory._replace(valid=torch.tensor([[[0.5, 1.0], [0.1, 0.1]]]))
    whole = memory._replace(valid=torch.ones(1, 2, 2))
    seen = position(0, content, None, ref, half)
    assert_close(seen.own, position(1, content, None, ref * torch.tensor([0.5, 1, 0.5, 1]), whole).own)
    assert seen.own is seen.cross


def test_the_gradient_of_a_layer_reaches_the_box_of_the_layer_before_and_no_further():
    model, moved = copy_of(lively()), []

    class Watched(RefiningHead):
        """Notes where the next layer looks, and from where it counts."""

        def refine(self, layer: int, content: Tensor, prediction: Prediction, ref: Tensor) -> tuple[Tensor, Tensor]:
            ref, base = super().refine(layer, content, prediction, ref)
            base.retain_grad()
            moved.append((ref, base))
            return ref, base

    model.decoder.head.__class__ = Watched
    model(pictures()).boxes[-1].sum().backward()
    (look, count), (_, unused) = moved
    assert not look.requires_grad and count.grad.abs().sum() > 0 and unused.grad is None


# --- the model --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("targets", [[NOTHING, NOTHING], [NOTHING, truth()[0]]], ids=["none", "one"])
def test_images_without_objects_train(targets):
    model = TINY.build(3).train()
    criterion = criterion_for(model)
    losses = criterion(model(pictures(), targets=targets), targets)
    criterion.total(losses).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_more_queries_than_cells_and_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="cells on all levels"), torch.no_grad():
        replace(TINY, num_queries=700).build(3).eval()(pictures())
    for field, value in (("dn_number", 0), ("dn_label_noise_ratio", 1.5), ("dn_box_noise_scale", -0.1)):
        with pytest.raises(ConfigError, match=field):
            replace(TINY, **{field: value})


def test_a_saved_folder_loads_and_changes_classes_and_queries(tmp_path):
    before = lively()
    before.save_pretrained(tmp_path)
    model = pretrained_model(tmp_path)
    assert model.config == TINY
    with torch.no_grad():
        assert_close(model(pictures())[:2], before(pictures())[:2], rtol=0, atol=0)
    resize_queries(replace_head(model, 7, keep={4: 2}), 8, keep=[1, 0])
    sizes = [len(table.weight) for table in model.class_maps()]
    assert sizes == [7, 7, 8] and model.num_classes == 7 and model.config.num_queries == 8
    old, new = before.queries, model.queries
    assert_close(new.known.labels.weight[[4, 7]], old.known.labels.weight[[2, 3]])
    assert_close(new.queries.contents.weight[:2], old.queries.contents.weight[[1, 0]])
    assert new.queries.contents.weight[2:].abs().max() < 1  # as in a new model: Xavier-uniform
    out = model.train()(pictures(), targets=truth())
    assert out.logits.shape == (2, 2, 8, 7) and out.extra["proposals"].logits.shape == (1, 2, 8, 7)
    n = 3 * 2 * 6
    model.queries.draws = RecordedDraws(label_p=torch.zeros(n), label_new=torch.full((n,), 6),
                                        box_sign=torch.zeros(n, 4, dtype=torch.int64), box_u=torch.full((n, 4), 0.5))
    losses = criterion_for(model)(model(pictures(), targets=truth()), truth())  # the new last class has a row
    assert all(value.isfinite() for value in losses.values())


def test_its_parts_are_those_of_two_stages():
    """With the two-stage model's choice and contents, what is left is the way boxes count and where queries stand."""
    assert issubclass(DINO, TwoStageDETR)
    mine, parent = ({name for name, _ in kind.build(3).named_parameters()} for kind in (TINY, replace_kind(TINY)))
    shared = {name for name in parent if name.startswith(("memory.", "encoder.", "decoder.layers."))}
    assert len(shared) > 50 and shared <= mine


def replace_kind(config: DINO) -> TwoStageDETR:
    """The parent with the same sizes."""
    own = ("dn_number", "dn_label_noise_ratio", "dn_box_noise_scale")
    return TwoStageDETR(**{name: value for name, value in vars(config).items() if name not in own})


# --- a run ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Drawn(DataConfig):
    """Scenes, some without objects."""

    def load(self) -> tuple[MemoryDataset, MemoryDataset]:
        """Scenes to learn from, and three others."""
        return series(12, 1, min_objects=0), series(3, 2)


def config(folder: str = "") -> TrainConfig:
    return TrainConfig(Drawn(), TINY, folder=str(folder), steps=4, batch_size=4, evaluations=1, log_every=1, scales=(),
                       progress=False)


def test_a_stopped_run_ends_as_one_that_was_not_stopped(tmp_path):
    def stop(run) -> None:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = fit(config(tmp_path / "whole"))
    assert {"loss_ce_dn", "loss_bbox_dn_0", "loss_giou_interm"} <= whole.history[-1].keys()
    with pytest.raises(SystemExit):
        fit(config(tmp_path / "run"), watch=stop)
    again = fit(config(tmp_path / "run"))
    assert again.step == whole.step == 4
    assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    for ours, theirs in zip(again.history, whole.history, strict=True):
        assert {**ours, "seconds": 0, "metrics": 0} == {**theirs, "seconds": 0, "metrics": 0}
