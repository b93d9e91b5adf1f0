"""Denoising: noise, slots and masks beside the authors' recorded ones, leaks that must be found, and DN-DETR whole."""

import json
import math
import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch
from family import NoisedMember, pictures
from official import DATA, batch
from small_runs import frozen_norms, series
from torch import Tensor
from torch.testing import assert_close

from detr_nb.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_nb.checkpoints import rename
from detr_nb.config import ConfigError
from detr_nb.family.dab import DABDETR
from detr_nb.family.denoising import (
    DNDETR,
    Noise,
    NoisedQueries,
    denoising_layouts,
    group_mask,
    replaced_labels,
)
from detr_nb.family.references import ReferenceQueries
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.insight import attention_maps
from detr_nb.loading import DataConfig, MemoryDataset
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, Draws, RecordedDraws, ResNetConfig, TinyConfig
from detr_nb.notation import Memory, Queries, Target
from detr_nb.pretrained import pretrained_model
from detr_nb.training import TrainConfig, fit

NAME = "dn_dab_detr_small"
SMALL = DNDETR(ResNetConfig("resnet18", pretrained=False), 20, dec_layers=3, enc_layers=2, dim_feedforward=128,
               dropout=0.0)
SIZES = {"backbone": TinyConfig((16, 16, 16), (4, 8, 8)), "hidden_dim": 16, "nheads": 2, "enc_layers": 1,
         "dec_layers": 2, "dim_feedforward": 16, "dropout": 0.0}
TINY = DNDETR(num_queries=5, **SIZES)
NOTHING = Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))
BATCH = ("image0_", (192, 256), (160, 224))


def truth() -> list[Target]:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4]])
    return [Target(labels=torch.tensor([1, 2]), boxes=boxes), Target(labels=torch.tensor([0]), boxes=boxes[1:])]


def loud(model: DETR) -> DETR:
    """With weights so large that every part has a say, and norms that do not depend on the batch."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in frozen_norms(model).parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


# --- the authors ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> NoisedMember:
    """Read from their checkpoint."""
    return NoisedMember(NAME, SMALL, tmp_path_factory.mktemp(NAME))


@pytest.fixture(scope="module")
def trained(authors):
    """Our model, what it says in training, and its losses."""
    model = authors.model().train()
    out = model(*batch(*BATCH), targets=authors.targets())
    return model, out, criterion_for(model)(out, authors.targets())


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    """Those of an evaluation: the authors' losses of the noised queries are 0 there, and enter their total."""
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


def test_their_file_tells_what_it_holds(authors):
    model = pretrained_model(authors.file)
    assert replace(model.config, dropout=0.0) == SMALL and model.num_classes == 91
    assert_close(model.state_dict(), authors.model().state_dict(), rtol=0, atol=0)


def test_noised_queries_are_the_authors(authors):
    model, order = authors.model(), authors.order()
    with torch.no_grad():
        asked = model.queries(model.memory(*batch(*BATCH)), authors.targets())
    assert_close(asked.ref[:, order], authors["dn/query_boxes_unsigmoid"].sigmoid(), atol=1e-6, rtol=0)
    assert_close(asked.content[:, order].sum(-1), authors["dn/query_label_sum"], atol=1e-4, rtol=0)
    assert torch.equal(asked.content[:, order, -1], authors["dn/query_indicator"])
    assert torch.equal(asked.self_mask[0, 0][order][:, order] == -math.inf, authors["dn/attn_mask"])
    (group,) = asked.groups
    assert group.repeats == int(authors["dn/num_groups"])
    image, slot = authors["dn/image"], authors["dn/slot"]
    for i, (slots, objects) in enumerate(group.matches):
        assert torch.equal(slots.sort().values, slot[image == i].sort().values)
        true = authors.targets()[i]["labels"][objects]
        seen = model.queries.known.labels.weight[authors["dn/labels"][image == i]]
        assert_close(asked.content[i, 20 + slots, :-1], seen)
        assert (true == authors["dn/labels"][image == i]).float().mean() > 0.5


def test_both_parts_of_a_training_step_are_the_authors(authors, trained):
    _, out, _ = trained
    for part, key in ((out, "train/"), (out.extra["dn"], "dn/")):
        assert_close(part.logits[-1], authors[f"{key}pred_logits"], atol=5e-4, rtol=0)
        assert_close(part.boxes[-1], authors[f"{key}pred_boxes"], atol=1e-4, rtol=0)
        assert_close(part.boxes[:-1], authors[f"{key}aux_boxes"], atol=1e-4, rtol=0)
    assert_close(out.extra["dn"].logits[:-1], authors["dn/aux_logits"], atol=5e-4, rtol=0)


def test_losses_of_a_training_step_are_the_authors(authors, trained):
    model, out, losses = trained
    checked = 0
    for name, value in authors.under("train/loss/").items():
        stem, _, layer = name.removeprefix("tgt_").partition("_")[2].partition("_")
        if stem in ("ce", "bbox", "giou"):
            ours = f"loss_{stem}{'_dn' * name.startswith('tgt')}{'_' * bool(layer)}{layer}"
            assert_close(losses[ours], value, rtol=1e-3, atol=1e-6)
            checked += 1
    assert checked == 2 * 3 * 3
    criterion = criterion_for(model)
    assert_close(criterion.total(losses), authors["train/total_loss"], rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(criterion.matcher(out, authors.targets()), authors.matches("train/"), strict=True):
        for pairs, their in zip(ours, theirs, strict=True):
            found = torch.stack(pairs)
            assert torch.equal(found[:, found[0].argsort()], their[:, their[0].argsort()])


def test_gradients_of_a_training_step_are_the_authors(authors, trained):
    model, _, losses = trained
    ours = authors.gradient_norms(model, criterion_for(model).total(losses))
    names, (_, rules, _) = json.loads((DATA / f"{NAME}.json").read_text())["grad_names"], denoising_layouts(SMALL)
    for name, norm in zip(names, authors["train/grad_norms"], strict=True):
        stem, stacked, kind = rename(name, rules[1]).rpartition("in_proj_")
        parts = [f"{stem}{part}.{kind}" for part in "qkv"] if stacked else [kind]
        found = torch.tensor([ours.get(part, 0.0) for part in parts]).double().norm()
        told = {"check_dtype": False, "msg": lambda text, name=name: f"{name}: {text}"}
        assert_close(found, norm, rtol=1e-2, atol=1e-4, **told)


def test_its_full_size_is_the_authors():
    """44 million parameters by the authors' count; DAB-DETR has the table of labels less."""
    with torch.device("meta"):
        model, plain = (kind(ResNetConfig(pretrained=False)).build(91) for kind in (DNDETR, DABDETR))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
    assert sizes[0] - sizes[1] == 92 * 255 and 43e6 < sizes[0] < 45e6


# --- the queries of any member ----------------------------------------------------------------------------------------
class Contrastive(Noise):
    """DINO's: of each object a copy to be repaired, and one that is moved too far."""

    copies = 2

    def groups(self, largest: int) -> int:
        return max(1, 6 // max(1, largest))

    def noised(self, labels: Tensor, boxes: Tensor, copy: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        labels = replaced_labels(labels, 0.25, self.labels.num_embeddings - 1, draws, boxes)
        sign = 2 * draws.integers("box_sign", 2, boxes.shape, boxes) - 1
        far = draws.uniform("box_u", boxes.shape, boxes) + copy[:, None]
        corners = cxcywh_to_xyxy(boxes) + 0.4 * sign * far * boxes[:, 2:].repeat(1, 2) / 2
        return labels, xyxy_to_cxcywh(corners.clamp(0, 1))


def empty_memory(count: int, d: int = 8) -> Memory:
    blank = torch.zeros(count, 1, d)
    return Memory(blank, blank, blank[..., 0].bool(), blank[..., :2], ((1, 1),), ())


def test_a_member_may_have_copies_that_answer_for_nothing():
    """Two images with 2 objects and 1: three groups of 2 x 2 slots; of each object's copies the second has no pair."""
    queries = NoisedQueries(ReferenceQueries(3, 8), Contrastive(4, 8))
    asked = queries(empty_memory(2), truth())
    (group,) = asked.groups
    assert asked.content.shape == (2, 3 + 12, 8) and group.part == slice(3, 15) and group.repeats == 3
    assert group.matches[0][0].tolist() == [0, 1, 4, 5, 8, 9] and group.matches[0][1].tolist() == [0, 1] * 3
    assert group.matches[1][0].tolist() == [0, 4, 8]
    assert torch.equal(asked.self_mask, group_mask(3, 4, 3))
    assert (asked.content[1, 3:].abs().sum(-1) > 0).tolist() == [True, False] * 6  # negatives are asked, too
    near, far = ((asked.ref[0, 3 + place : 15 : 4, :2] - truth()[0]["boxes"][0, :2]).abs() for place in (0, 2))
    assert (near <= 0.4 * torch.tensor([0.1, 0.15]) + 1e-6).all() and torch.isfinite(far).all()


def test_the_member_decides_the_number_of_groups():
    queries = NoisedQueries(ReferenceQueries(3, 8), Contrastive(4, 8))
    for targets, slots in (([truth()[0]], 3 * 4), ([truth()[1]], 6 * 2), ([NOTHING], 6 * 2)):
        assert queries(empty_memory(1), targets).content.shape[1] == 3 + slots


class Masked(ReferenceQueries):
    """Queries that have a mask and a group of their own already."""

    def forward(self, memory: Memory, targets: list[Target] | None = None) -> Queries:
        """The first does not see the last."""
        mask = torch.zeros(1, 1, 3, 3)
        mask[..., 0, 2] = -math.inf
        return super().forward(memory, targets)._replace(self_mask=mask)


def test_a_mask_that_is_there_stays():
    asked = NoisedQueries(Masked(3, 8), Contrastive(4, 8))(empty_memory(1), truth()[:1])
    expected = group_mask(3, 4, 3)
    expected[..., 0, 2] = -math.inf
    assert torch.equal(asked.self_mask, expected)


def test_queries_without_boxes_and_targets_that_cannot_be_are_refused():
    known = Contrastive(4, 8)
    with pytest.raises(ValueError, match="whose reference is a box"):
        NoisedQueries(ReferenceQueries(3, 8, numbers=2), known)(empty_memory(1), [NOTHING])
    bad = Target(labels=torch.tensor([4]), boxes=torch.tensor([[0.5, 0.5, 0.1, 0.1]]), image_id=12)
    with pytest.raises(ValueError, match=r"image 12: label 4 of target 0 is outside 0\.\.3"):
        NoisedQueries(ReferenceQueries(3, 8), known)(empty_memory(1), [bad])
    with pytest.raises(ValueError, match="2 images but 1 targets"):
        NoisedQueries(ReferenceQueries(3, 8), known)(empty_memory(2), [NOTHING])
    for field, value in (("scalar", 0), ("label_noise_scale", 1.5), ("box_noise_scale", -0.1)):
        with pytest.raises(ConfigError, match=field):
            replace(TINY, **{field: value})


# --- what training must not do to the answers -------------------------------------------------------------------------
def test_answers_are_blind_to_the_truth_and_equal_to_those_of_inference():
    model, images = loud(TINY.build(3)), pictures()
    pad = torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 40:] = True
    with torch.no_grad():
        alone = model.eval()(images, pad)
        assert not alone.extra
        for targets in (truth(), truth()[::-1], [NOTHING, NOTHING]):
            together = model.train()(images, pad, targets=targets)
            assert_close(together.logits, alone.logits, rtol=1e-4, atol=1e-4)
            assert_close(together.boxes, alone.boxes, rtol=1e-4, atol=1e-4)
        unmasked = model.queries(model.encoder(model.memory(images, pad)), truth())._replace(self_mask=None)
        leaking = model.decoder(unmasked, model.encoder(model.memory(images, pad)))
    assert (leaking.logits - alone.logits).abs().max() > 1e-2


@pytest.mark.parametrize("patterns", [0, 3])
def test_without_the_row_of_no_class_it_is_dab_detr(patterns):
    model = loud(replace(TINY, num_patterns=patterns).build(3)).eval()
    parent = frozen_norms(DABDETR(num_queries=5, num_patterns=patterns, **SIZES).build(3)).eval()
    state = {name.replace("queries.queries.", "queries."): value for name, value in model.state_dict().items()}
    parent.load_state_dict({name: value for name, value in state.items() if ".known." not in name})
    with torch.no_grad():
        assert (model(pictures()).logits - parent(pictures()).logits).abs().max() > 1e-2
        model.queries.known.labels.weight[-1] = 0
        assert torch.equal(model(pictures()).logits, parent(pictures()).logits)
        pairs = [criterion_for(one)(one.train()(pictures(), targets=truth()), truth()) for one in (model, parent)]
    for name, value in pairs[1].items():
        assert_close(pairs[0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [[NOTHING, NOTHING], [NOTHING, truth()[0]]], ids=["none", "one"])
def test_images_without_objects_train(targets):
    model = TINY.build(3).train()
    criterion = criterion_for(model)
    losses = criterion(model(pictures(), targets=targets), targets)
    criterion.total(losses).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not sum(len(target["labels"]) for target in targets):
        assert losses["loss_ce_dn"] == losses["loss_bbox_dn"] == losses["loss_giou_dn"] == 0


def test_every_loss_of_the_group_is_divided_by_objects_times_groups():
    model = TINY.build(3).train()
    out = model(pictures(), targets=truth())
    losses, part, far = criterion_for(model)(out, truth()), out.extra["dn"], torch.zeros(())
    for image, target in enumerate(truth()):
        for group in range(5):
            for place, box in enumerate(target["boxes"]):
                far = far + (part.boxes[-1, image, 2 * group + place] - box).abs().sum()
    assert_close(losses["loss_bbox_dn"], far / (3 * 5))


# --- a run ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Drawn(DataConfig):
    """Scenes, some without objects."""

    def load(self) -> tuple[MemoryDataset, MemoryDataset]:
        """Scenes to learn from, and three others."""
        return series(12, 1, min_objects=0), series(3, 2)


def config(folder: str = "") -> TrainConfig:
    return TrainConfig(Drawn(), TINY, folder=str(folder), steps=6, batch_size=4, evaluations=1, log_every=1, scales=(),
                       progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was not interrupted."""
    return fit(config(tmp_path_factory.mktemp("whole") / "run"))


def test_fit_trains_every_part(run):
    assert {"loss_ce_dn", "loss_bbox_dn_0", "loss_giou_dn"} <= run.history[-1].keys()
    assert all(math.isfinite(value) for value in run.history[-1].values() if isinstance(value, float))
    torch.manual_seed(run.config.seed)
    fresh = dict(TINY.build(3).named_parameters())
    still = {name for name, now in run.model.named_parameters() if torch.equal(now, fresh[name])}
    assert not {name for name in still if not name.endswith((".k.bias", "k_pos.bias"))}


def test_a_stopped_run_ends_as_one_that_was_not_stopped(run, tmp_path):
    def stop(run) -> None:
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        fit(config(tmp_path / "run"), watch=stop)
    again = fit(config(tmp_path / "run"))
    assert again.step == run.step == 6
    assert_close(again.model.state_dict(), run.model.state_dict(), rtol=0, atol=0)
    for ours, theirs in zip(again.history, run.history, strict=True):
        assert {**ours, "seconds": 0, "metrics": 0} == {**theirs, "seconds": 0, "metrics": 0}


def test_a_saved_folder_loads_and_changes_classes_and_queries(run, tmp_path):
    run.model.eval().save_pretrained(tmp_path)
    model = pretrained_model(tmp_path)
    assert model.config == TINY
    with torch.no_grad():
        assert_close(model(pictures())[:2], run.model(pictures())[:2])
    resize_queries(replace_head(model, 7, keep={4: 2}), 8)
    sizes = [len(table.weight) for table in model.class_maps()]
    assert sizes == [7, 8] and model.num_classes == 7 and model.config.num_queries == 8
    assert_close(model.queries.known.labels.weight[[4, 7]], run.model.queries.known.labels.weight[[2, 3]])
    out = model.train()(pictures(), targets=truth())
    assert out.logits.shape == (2, 2, 8, 7) and out.extra["dn"].logits.shape == (2, 2, 10, 7)
    model.queries.draws = RecordedDraws(label_p=torch.zeros(15), label_new=torch.full((15,), 6),
                                        box_u=torch.full((15, 4), 0.5))
    losses = criterion_for(model)(model(pictures(), targets=truth()), truth())  # the new last class has a row
    assert all(value.isfinite() for value in losses.values())


def test_what_it_looks_at_can_be_drawn(run):
    maps = attention_maps(run.model, pictures())
    assert maps.cross.shape == (2, 2, 2, 5, 96) and maps.queries.shape == (2, 2, 2, 5, 5)
    assert_close(maps.cross.sum(-1), torch.ones(2, 2, 2, 5))
