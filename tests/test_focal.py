"""Sigmoid scores and the focal loss: beside torchvision, the authors' recorded outputs, and DETR itself."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from official import Reference, official_weights
from small_runs import series
from test_seams import TINY, Pairs, pictures, truth
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from detr_nb.clinic import collect_evidence, findings
from detr_nb.errors import confusion_matrix, error_breakdown
from detr_nb.evaluation import coco_evaluate, evaluate, predict
from detr_nb.explorables import record_attention, record_scene, record_training
from detr_nb.family.focal import FocalClasses, FocalDETR, focal_cost, focal_loss
from detr_nb.finetuning import FineTuned, replace_head, resize_queries
from detr_nb.insight import attention_maps
from detr_nb.losses import Normaliser, SetCriterion, criterion_for
from detr_nb.matcher import HungarianMatcher, pad_targets
from detr_nb.model import (
    DETRConfig,
    ResNetConfig,
    SigmoidScores,
    SoftmaxScores,
    postprocess,
)
from detr_nb.notation import Output, Target
from detr_nb.pretrained import load_pretrained, predict_image, pretrained_model
from detr_nb.training import TrainConfig, fit, read_config

SMALL = FocalDETR(num_queries=5, **TINY)
CLASSES = 4
EMPTY = Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))


def made(seed: int = 0, config: DETRConfig = SMALL, classes: int = CLASSES):
    """A small model with the weights of a seed."""
    torch.manual_seed(seed)
    return config.build(classes).eval()


def random_out(layers: int = 2, images: int = 2, queries: int = 5, columns: int = CLASSES) -> Output:
    """Predictions of nobody."""
    dice = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(layers, images, queries, columns, generator=dice)
    return Output(logits, 0.2 + 0.5 * torch.rand(layers, images, queries, 4, generator=dice))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    few = {"steps": 2, "batch_size": 4, "evaluations": 1, "log_every": 1, "scales": (), "progress": False}
    return fit(TrainConfig(Pairs(), SMALL, folder=str(tmp_path_factory.mktemp("focal") / "run"), **few))


# --- the loss -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (0.75, 1.5), (0.5, 0), (0.1, 5)])
def test_values_and_gradients_are_those_of_torchvision(alpha, gamma):
    dice = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(7, 9, dtype=torch.float64, generator=dice)).requires_grad_()
    yes = (torch.rand(7, 9, generator=dice) < 0.3).double()
    weights = torch.rand(7, 9, dtype=torch.float64, generator=dice)
    ours, theirs = focal_loss(logits, yes, alpha, gamma), sigmoid_focal_loss(logits, yes, alpha, gamma)
    assert_close(ours, theirs)
    pairs = [torch.autograd.grad((loss * weights).sum(), logits)[0] for loss in (ours, theirs)]
    assert_close(*pairs)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, yes[0], alpha, gamma), logits[0])


def test_without_focus_it_is_half_the_cross_entropy():
    logits, yes = torch.linspace(-30, 30, 61), torch.arange(61.0) % 2
    plain = F.binary_cross_entropy_with_logits(logits, yes, reduction="none")
    assert_close(focal_loss(logits, yes, 0.5, 0), plain / 2)


def test_large_logits_have_finite_losses_and_gradients():
    logits = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert_close(loss.detach(), torch.tensor([150.0, 0.0, 0.0, 50.0]))
    loss.sum().backward()
    assert_close(logits.grad, torch.tensor([0.75, 0.0, 0.0, -0.25]))


def test_alpha_weighs_yes_and_its_rest_no():
    even = torch.zeros(2)
    yes, no = focal_loss(even, torch.tensor([1.0, 0.0]), alpha=0.9).tolist()
    assert math.isclose(yes / no, 9, rel_tol=1e-5)


# --- classes of a set -----------------------------------------------------------------------------------------------
def by_loop(logits: Tensor, wanted: Tensor, known: int, matched_only: bool, by: int) -> Tensor:
    """The loss of one layer, question by question."""
    total = torch.tensor(0.0)
    for image, row in zip(logits, wanted.tolist(), strict=True):
        for query, label in zip(image, row, strict=True):
            if matched_only and not label < known:
                continue
            for column, logit in enumerate(query):
                yes = torch.tensor(float(column == label and column < known))
                total += sigmoid_focal_loss(logit, yes)
    return total / by


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("matched_only", [False, True])
def test_the_loss_of_a_set_is_that_of_a_loop(spare, matched_only):
    rule, out = FocalClasses(spare, matched_only), random_out()
    known = CLASSES - spare
    wanted = torch.tensor([[[0, known, 2, known, 1], [known] * 5], [[known] * 5, [2, 2, 0, known, known]]])
    found = rule.loss(out.logits, wanted, 3)
    slow = [by_loop(*layer, known, matched_only, 3) for layer in zip(out.logits, wanted, strict=True)]
    assert_close(found, torch.stack(slow))


def test_it_is_divided_by_objects_whatever_the_queries():
    rule = FocalClasses()
    assert not rule.counts_queries
    assert rule.normaliser([3, 0, 4], 1) == rule.normaliser([3, 0, 4], 300) == 7
    out, nobody = random_out(), torch.full((2, 2, 5), CLASSES)
    assert_close(rule.loss(out.logits, nobody, 0), rule.loss(out.logits, nobody, 1))
    assert FocalClasses(matched_only=True).loss(out.logits, nobody, 0).tolist() == [0, 0]


def test_parts_of_a_batch_add_up():
    out, targets = random_out(images=3), [*truth(), EMPTY]
    criterion = SetCriterion(CLASSES, classes=FocalClasses(), class_term=focal_cost)
    by = criterion.normalisers(targets, 5)
    assert by == Normaliser(3, 3)
    whole = criterion(out, targets)
    parts = [criterion(out.apply(lambda x, i=i: x[:, i : i + 1]), targets[i : i + 1], by) for i in range(3)]
    for name in ("loss_ce", "loss_ce_0", "loss_bbox", "loss_giou_0"):
        assert_close(sum(part[name] for part in parts), whole[name])


def test_known_queries_alone_are_taught():
    out = random_out()
    logits = out.logits.requires_grad_()
    criterion = SetCriterion(CLASSES, classes=FocalClasses(matched_only=True), class_term=focal_cost)
    criterion(out, truth())["loss_ce"].backward()
    taught = logits.grad[-1].abs().sum(-1) > 0
    matched = torch.zeros(2, 5, dtype=torch.bool)
    for image, (queries, _) in enumerate(criterion.matcher(out, truth())[-1]):
        matched[image, queries] = True
    assert torch.equal(taught, matched) and not logits.grad[0].any()


def test_claims_are_scores_above_one_half():
    logits = torch.tensor([[[[0.1, -1, -1], [-0.1, -2, 5], [-1, 3, -9]]]])
    assert FocalClasses().claimed(logits).tolist() == [[[True, True, True]]]
    assert FocalClasses(spare=1).claimed(logits).tolist() == [[[True, False, True]]]


def test_another_number_of_columns_is_refused():
    criterion = SetCriterion(91, classes=FocalClasses(), class_term=focal_cost)
    with pytest.raises(ValueError, match="91 classes . 0 spare.*92 columns"):
        criterion(random_out(columns=92), truth())


def test_spare_columns_are_taught_no_and_never_asked():
    scores, rule = SigmoidScores(spare=1), FocalClasses(spare=1)
    assert scores.columns(CLASSES) == CLASSES + 1
    logits = random_out(columns=CLASSES + 1).logits
    logits[..., -1] = 50
    logits.requires_grad_()
    assert int(scores.select(logits[-1].detach()).labels.max()) == CLASSES - 1
    rule.loss(logits, torch.full((2, 2, 5), CLASSES), 1).sum().backward()
    assert (logits.grad[..., -1] > 0).all()  # it is pushed down, also where "nothing" is written with its number
    criterion = SetCriterion(CLASSES, classes=rule, class_term=focal_cost)
    last = [Target(labels=torch.tensor([CLASSES]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]])), EMPTY]
    with pytest.raises(ValueError, match=f"label {CLASSES} .* outside 0..{CLASSES - 1}"):
        criterion(random_out(columns=CLASSES + 1), last)


# --- matching -------------------------------------------------------------------------------------------------------
def test_the_cost_is_that_of_a_loop():
    out, targets = random_out(), truth()
    cost = focal_cost(out, pad_targets(targets, out.boxes))
    for layer in range(2):
        for image, target in enumerate(targets):
            for query in range(5):
                for place, label in enumerate(target["labels"].tolist()):
                    p = float(out.logits[layer, image, query, label].double().sigmoid())
                    yes, no = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8), -0.75 * p**2 * math.log(1 - p + 1e-8)
                    assert math.isclose(cost[layer, image, query, place], yes - no, rel_tol=1e-4, abs_tol=1e-5)


def test_the_cost_stays_finite_and_falls_with_the_probability():
    row = torch.tensor([-1e4, -30.0, -2.0, 0.0, 2.0, 30.0, 1e4])[None, None, :, None]
    one = [Target(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))]
    out = Output(row, torch.full((1, 1, 7, 4), 0.5))
    cost = focal_cost(out, pad_targets(one, out.boxes))[0, 0, :, 0]
    assert cost.isfinite().all() and (cost.diff() <= 0).all()
    assert_close(cost[[0, -1]], torch.tensor([0.25, -0.75]) * -math.log(1e-8))


@pytest.mark.parametrize(("name", "spare"), [("conditional_detr_small", 0), ("smca_r18_small_type3", 1)])
def test_losses_matches_and_detections_of_recorded_predictions_are_the_authors(name, spare):
    """No model is needed: the authors' logits and boxes are recorded. SMCA's head has a column that is no class."""
    reference = Reference(name)
    stacked = (torch.cat((reference[f"aux_{x}"], reference[f"pred_{x}"][None])) for x in ("logits", "boxes"))
    out, targets = Output(*stacked), reference.targets()
    rule = {"classes": FocalClasses(spare), "class_term": focal_cost, "weight_ce": 2}
    criterion = SetCriterion(91, 2, dec_layers=len(out.logits), **rule)
    for ours, theirs in zip(criterion.matcher(out, targets), reference.matches(), strict=True):
        for (queries, objects), pairs in zip(ours, theirs, strict=True):
            assert_close(torch.stack((queries, objects))[:, queries.argsort()], pairs[:, pairs[0].argsort()])
    losses = criterion(out, targets)
    compared = {key: value for key, value in reference.under("loss/").items() if "cardinality" not in key}
    assert len(compared) == 3 * len(out.logits) + 1
    for key, value in compared.items():
        assert_close(losses[key], value, rtol=1e-5, atol=1e-6)
    assert_close(criterion.total(losses), reference["total_loss"], rtol=1e-5, atol=1e-5, check_dtype=False)
    sizes = [tuple(reference[f"target{i}/orig_size"].tolist()) for i in range(2)]
    scores = SigmoidScores(len(reference["post0/scores"]), spare)  # SMCA keeps as many as there are queries
    for i, found in enumerate(postprocess(out, sizes, scores)):
        theirs = reference.under(f"post{i}/")
        assert_close(found["scores"], theirs["scores"])
        assert torch.equal(found["labels"], theirs["labels"])
        assert_close(found["boxes"], theirs["boxes"], rtol=1e-5, atol=1e-3)


def test_the_authors_start_is_ours():
    """Their class biases are filled with other numbers for the references; the start of ours is a hundredth."""
    assert "class_embed.bias" in official_weights("conditional_detr_small")
    assert math.isclose(1 / (1 + math.exp(-SigmoidScores.start)), 0.01)


def test_the_matcher_takes_every_column_for_a_class_when_told():
    out = random_out()
    last = [Target(labels=torch.tensor([CLASSES - 1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))] * 2
    with pytest.raises(ValueError, match="outside 0..2"):
        HungarianMatcher()(out, last)
    ((queries, _), _) = HungarianMatcher(2, 0, 0, focal_cost, no_object=False)(out, last)[-1]
    assert queries.tolist() == [int(out.logits[-1, 0, :, -1].argmax())]


# --- answers --------------------------------------------------------------------------------------------------------
def test_one_query_may_answer_twice():
    logits = torch.tensor([[[2.0, 1.0, -5.0], [-4.0, -4.0, 0.5]]])
    chosen = SigmoidScores(top=3).select(logits)
    assert chosen.queries.tolist() == [[0, 0, 1]] and chosen.labels.tolist() == [[0, 1, 2]]
    slow = sorted(((x, c, q) for q, row in enumerate(logits[0].sigmoid().tolist()) for c, x in enumerate(row)),
                  reverse=True)
    everything = SigmoidScores(top=100).select(logits)
    assert_close(everything.scores[0], torch.tensor([row[0] for row in slow]))
    assert everything.scores.shape == (1, 6)


# --- the model ------------------------------------------------------------------------------------------------------
def test_it_is_detr_with_other_scores():
    """From the same seed all weights but the class biases are equal; with DETR's bias and scores, so is everything."""
    ours, detr = made(), made(config=DETRConfig(num_queries=5, **TINY), classes=CLASSES - 1)
    assert ours.scores == SigmoidScores(100) and ours.threshold == 0.3 and detr.threshold == 0.7
    differ = [name for name, value in detr.state_dict().items() if not torch.equal(value, ours.state_dict()[name])]
    assert differ == ["decoder.head.classes.bias"]
    assert_close(ours.head.classes.bias.detach(), torch.full((CLASSES,), -math.log(99)))
    ours.load_state_dict(detr.state_dict())
    ours.scores = SoftmaxScores()
    with torch.no_grad():
        one, other = ours(pictures()), detr(pictures())
    assert_close(one[:3], other[:3], rtol=0, atol=0)
    assert_close(ours.postprocess(one, [(64, 96)] * 2), detr.postprocess(other, [(64, 96)] * 2), rtol=0, atol=0)
    losses = [SetCriterion(CLASSES - 1)(out, truth()) for out in (one, other)]
    assert_close(*losses, rtol=0, atol=0)


def test_a_fresh_model_says_yes_to_about_one_in_a_hundred():
    with torch.no_grad():
        scores = SMALL.scores()(made()(pictures()).logits)
    assert 0.003 < scores.mean() < 0.03 and scores.max() < 0.1


def test_the_full_size_has_detrs_parameters():
    sizes = {"backbone": ResNetConfig(pretrained=False), "num_queries": 300}
    with torch.device("meta"):
        ours, detr = FocalDETR(**sizes).build(91), DETRConfig(**sizes).build(91)
    ours, detr = (sum(p.numel() for p in model.parameters()) for model in (ours, detr))
    assert FocalDETR().num_queries == 300 and detr - ours == 257  # no-object's row


def test_the_authors_loss_belongs_to_it():
    criterion = criterion_for(made(), no_object_weight=0.5, cost_bbox=4)  # `fit` tells all its weights
    assert criterion.last_layer_weights == {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
    assert (criterion.matcher.cost_class, criterion.matcher.class_term) == (2, focal_cost)
    assert criterion.matcher.box_weights == {"bbox": 4, "giou": 2} and not criterion.matcher.no_object
    assert criterion.classes == FocalClasses() and criterion.dec_layers == 2


@pytest.mark.parametrize("targets", [[EMPTY, EMPTY], [truth()[0], EMPTY]], ids=["none", "mixed"])
def test_images_without_objects_give_finite_losses_and_gradients(targets):
    model = made().train()
    criterion = criterion_for(model)
    total = criterion.total(criterion(model(pictures(), targets=targets), targets))
    total.backward()
    assert total.isfinite() and total > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.head.classes.bias.grad.abs().min() > 0


# --- in the library -------------------------------------------------------------------------------------------------
def test_flags_describe_it():
    config = read_config(["--model", "FocalDETR", "--model.num_queries", "7"])
    assert config.model == FocalDETR(num_queries=7)


def test_a_run_learns_and_is_read_by_its_own_scores(run):
    assert all(math.isfinite(value) for value in run.history[-1].values() if isinstance(value, float))
    val = run.config.data.load()[1]
    found, targets = predict(run.model, val), [target for _, target in val]
    assert [len(row["scores"]) for row in found] == [15] * 5  # five queries, three classes
    own = coco_evaluate(targets, found, val.names, val.category_ids)["AP"]
    assert evaluate(run.model, val)["AP"] == own
    kinds = error_breakdown(targets, found, min_score=0)
    assert sum(kinds[kind] for kind in kinds if kind != "missed") == 75
    assert confusion_matrix(targets, found, 3, min_score=0)[:, :-1].sum() == 75


def test_a_run_and_a_saved_folder_load_as_what_they_are(run, tmp_path):
    run.model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        out = run.model(pictures())
        for source in (run.folder, tmp_path):
            model = pretrained_model(source)
            assert (model.config, model.scores, model.threshold) == (SMALL, SigmoidScores(100), 0.3)
            assert_close(model(pictures())[:2], out[:2])
    image = series(1, 3)[0][0]
    assert len(predict_image(model, image)["scores"]) < len(predict_image(model, image, 0.0)["scores"]) == 15


def test_a_softmax_model_does_not_load_into_it(tmp_path):
    made(config=DETRConfig(num_queries=5, **TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        load_pretrained(made(), tmp_path)


def test_new_classes_start_quietly_and_queries_can_be_resized(run, tmp_path):
    old = run.model.head.classes
    run.model.save_pretrained(tmp_path)
    model = replace_head(pretrained_model(tmp_path), 5, keep={4: 2})
    bias = model.head.classes.bias.detach()
    assert_close(bias[:4], torch.full((4,), SigmoidScores.start))
    assert_close(bias[4], old.bias.detach()[2])
    assert_close(model.head.classes.weight.detach()[4], old.weight.detach()[2])
    resize_queries(model, 8)
    assert model.config == replace(SMALL, num_queries=8) and model(pictures()).logits.shape == (2, 2, 8, 5)
    tuned = FineTuned(str(tmp_path), num_queries=3).build(2)
    assert_close(tuned.head.classes.bias.detach(), torch.full((2,), SigmoidScores.start))


def test_insight_and_the_explorables_read_it(run):
    maps = attention_maps(run.model, pictures())
    assert_close(maps.cross.sum(-1), torch.ones(maps.cross.shape[:-1]))
    image, _ = run.config.data.load()[1][0]
    last = Target(labels=torch.tensor([2]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.4]]))  # the last class is one
    (frame,) = record_training(run.model, {2: run.model.state_dict()}, image, last)["frames"]
    with torch.no_grad():
        out = run.model.eval()(run.model.preprocess(image)[None])
    ((queries, _),) = criterion_for(run.model).matcher(out, [last])[-1]
    assert frame["matched"] == queries.tolist()
    assert len(record_scene(run.model, image, last)["layers"]) == 2
    assert len(record_attention(run.model, image, 0.0)["objects"]) == 5


def test_the_clinic_blames_no_weight_that_it_does_not_have(run):
    seen = collect_evidence(run, images=5)
    assert seen["no_object_weight"] == 0 and seen["answers"] < 0.5 * seen["objects"]
    assert "no-object weighs too much" not in [finding.name for finding in findings(seen)]
    blamed = [finding.name for finding in findings({**seen, "no_object_weight": 1.0, "queries": 300})]
    assert "no-object weighs too much" in blamed
    assert findings({**seen, "objects": 0.0}) is not None


def test_a_member_that_says_so_keeps_more_answers_and_spare_columns():
    class Wide(FocalDETR):
        TOP, THRESHOLD = 7, 0.2

        def scores(self):
            return SigmoidScores(self.TOP, spare=1)

    model = made(config=Wide(num_queries=5, **TINY))
    assert model.threshold == 0.2 and model.num_classes == CLASSES and model.head.classes.out_features == CLASSES + 1
    found = model.postprocess(model(pictures()), [(1, 1)] * 2)
    assert [len(row["scores"]) for row in found] == [7, 7]
    criterion = criterion_for(model)
    assert criterion.classes.spare == 1 and criterion.total(criterion(model(pictures()), truth())).isfinite()
    assert len(replace_head(model, 2).head.classes.bias) == 3
    assert SimpleNamespace(scores=model.scores).scores.columns(2) == 3
