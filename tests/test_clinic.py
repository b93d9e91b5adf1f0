"""The clinic: each measurement against something known, and every recorded failure gets the right name."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from small_runs import CONFIG, Drawn
from torch import nn

from detr_nb.boxes import cxcywh_to_xyxy
from detr_nb.cache import render_scenes
from detr_nb.clinic import (
    RULES,
    DiagnosisCallback,
    Finding,
    Samples,
    ap_of,
    class_table,
    collect_evidence,
    common_shift,
    diagnose,
    findings,
    format_findings,
    found_share,
    in_mode,
    log_evidence,
    lost_areas,
    mode_evidence,
    padded_by_own,
    padding_evidence,
    renaming,
    target_evidence,
    weight_evidence,
)
from detr_nb.data import RandomSizeCrop, apply_transform
from detr_nb.failures import FAILURES, IgnoresPadding, PaddedBoxes
from detr_nb.loading import MemoryDataset
from detr_nb.losses import SetCriterion
from detr_nb.model import detr_tiny
from detr_nb.notation import Output, Target
from detr_nb.shapes import EASY, Scenes
from detr_nb.steps import running_means
from detr_nb.training import create_run, fit

ROOT = Path(__file__).resolve().parents[1]
RECORD = json.loads((ROOT / "results" / "clinic.json").read_text("utf8"))["rows"]


def perfect(targets, classes: int, queries: int = 8, rename=lambda label: label) -> Output:
    """Answers that are the truth, under other names; the queries that are left over say nothing."""
    logits, boxes = torch.zeros(1, len(targets), queries, classes + 1), torch.full((1, len(targets), queries, 4), 0.01)
    logits[..., -1] = 9
    for image, target in enumerate(targets):
        for query, (label, box) in enumerate(zip(target["labels"].tolist(), target["boxes"], strict=True)):
            logits[0, image, query] = 0
            logits[0, image, query, rename(label)] = 9
            boxes[0, image, query] = box
    return Output(logits, boxes)


@pytest.fixture(scope="module")
def drawn() -> MemoryDataset:
    scenes = Scenes(EASY, 24, 3)
    return MemoryDataset(*render_scenes(scenes, workers=1), scenes.names, scenes.category_ids)


# --- recorded failures --------------------------------------------------------------------------------------------
def test_every_failure_is_recorded():
    assert [row["name"] for row in RECORD] == list(FAILURES)


@pytest.mark.parametrize("row", RECORD, ids=lambda row: row["name"])
def test_a_recorded_failure_gets_its_name_first_and_a_healthy_run_none(row):
    found = [finding.name for finding in findings(row["seen"])]
    if row["name"].startswith("healthy"):
        assert found == []
    else:
        assert row["name"].startswith(found[0])


@pytest.mark.parametrize("row", RECORD, ids=lambda row: row["name"])
def test_a_rule_without_its_illness_is_silent_on_all_others(row):
    """Beside the name itself only consequences may be named: too little learned, or learned by heart."""
    others = {finding.name for finding in findings(row["seen"]) if not row["name"].startswith(finding.name)}
    assert others <= {"stopped too early"}


def test_every_rule_has_a_failure():
    named = {finding.name for row in RECORD for finding in findings(row["seen"])}
    assert {rule.name for rule in RULES} - named == {"classes in another order"}  # it is made by hand below
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_a_renaming_that_is_no_shift_is_another_order():
    healthy = RECORD[0]["seen"]
    seen = healthy | {"right": 0.3, "renamed": 0.9, "shift": 0}
    assert [finding.name for finding in findings(seen)] == ["classes in another order"]
    assert "30% of the classes are right as they stand, and 90% after renaming" == findings(seen)[0].evidence
    assert [finding.name for finding in findings(seen | {"shift": 2})] == ["class ids off by one"]
    assert findings(seen | {"compared": 20}) == []


# --- measurements -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_renaming_is_found_whatever_it_is(drawn, shift):
    out = perfect(drawn.targets, 3, rename=lambda label: (label + shift) % 3)
    table = class_table(out, drawn.targets)
    assert table.sum() == sum(len(target["labels"]) for target in drawn.targets)
    right, renamed, names = renaming(table)
    assert (right == 1) == (shift == 0) and renamed == 1 and common_shift(names) == shift
    assert (ap_of(out, drawn.targets, drawn.names) > 0.99) == (shift == 0)


def test_a_renaming_that_is_no_shift_is_none(drawn):
    swap = {0: 1, 1: 0, 2: 2}
    table = class_table(perfect(drawn.targets, 3, rename=swap.get), drawn.targets)
    assert renaming(table)[2] == [1, 0, 2] and common_shift([1, 0, 2]) == 0


def test_objects_without_a_box_enter_no_table():
    target = Target(labels=torch.tensor([0]), boxes=torch.tensor([[0.2, 0.2, 0.1, 0.1]]))
    far = Output(torch.zeros(1, 1, 1, 3), torch.tensor([[[[0.8, 0.8, 0.1, 0.1]]]]))
    assert class_table(far, [target]).sum() == 0


def test_formats_are_told_apart_by_numbers_alone(drawn):
    def changed(change):
        return target_evidence([{**target, "boxes": change(target["boxes"])} for target in drawn.targets])

    right, corners, pixels = changed(lambda b: b), changed(cxcywh_to_xyxy), changed(lambda b: 128 * b)
    assert right["largest"] <= 1 and right["outside"] == 0
    assert corners["outside"] > 0.2 and corners["corners"] == 1
    assert 2 < pixels["largest"] <= 128
    assert right["objects"] == sum(len(target["boxes"]) for target in drawn.targets) / 24


@pytest.mark.parametrize("side", [1e-4, 1e-3, 0.03, 1.0])
def test_lost_areas_are_those_that_python_says(side):
    boxes = torch.tensor([[0.5, 0.5, side, side]])
    rounded = torch.tensor(side, dtype=torch.float16).item()
    exact, product = side * side, torch.tensor(rounded * rounded).half().item()
    assert lost_areas(boxes, (1, 1), torch.float16)[0] == float(abs(product - exact) > 0.01 * exact)
    assert lost_areas(boxes, (4000, 4000), torch.float32) == (0, 0)
    assert lost_areas(boxes, (4000, 4000), torch.float16)[1] == float((4000 * side) ** 2 > 65504)


def test_stale_boxes_are_found_after_the_factor_and_not_before(drawn):
    """The damage of the failure, the factors of the examination: one undoes the other."""
    rng = torch.Generator().manual_seed(0)
    cut, stale = RandomSizeCrop(64, 128), PaddedBoxes(128)
    pictures, damaged = [], []
    for image, target in [drawn[i] for i in range(16)]:
        torch.manual_seed(int(torch.randint(1000, (), generator=rng)))
        small, own = apply_transform(cut, image, target)
        pictures.append((small, own))
        damaged.append(apply_transform(stale, small, own)[1])
    pictures[0] = (torch.zeros(3, 128, 128, dtype=torch.uint8), pictures[0][1])  # so that the batch is as large as said
    damaged[0] = pictures[0][1]
    boxes, truth = perfect(damaged, 3).boxes[-1], [target for _, target in pictures]
    assert found_share(boxes, truth, padded_by_own(pictures)) > 0.95
    assert found_share(boxes, truth, [(1, 1)] * 16) < 0.75


def test_a_forgotten_mask_is_felt_and_a_kept_one_is_not(drawn):
    careful, careless = detr_tiny(pretrained=True), detr_tiny(pretrained=True)
    careless.memory = IgnoresPadding(careless.memory)
    kept, forgotten = padding_evidence(careful, drawn), padding_evidence(careless, drawn)
    assert forgotten["padding"] > 0.1 > 0.05 > kept["padding"]
    assert forgotten["mask_felt"] == 0 and kept["mask_felt"] > 0.01
    nothing = Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))
    assert padding_evidence(careful, Samples([(drawn[0][0], nothing)], drawn)) == {"padding": 0.0, "mask_felt": 0.0}


def test_weights_that_did_not_move_are_counted():
    fresh, moved = detr_tiny(), detr_tiny()
    moved.load_state_dict(fresh.state_dict())
    assert weight_evidence(moved, fresh) == {"still": 1.0, "still_backbone": 1.0, "growth": 1.0}
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.mul_(2 if "backbone" in name else 1)
    seen = weight_evidence(moved, fresh)
    assert seen["still"] == 1 and seen["still_backbone"] < 0.2  # biases that are zero stay


def test_looking_at_a_model_leaves_it_as_it_was(drawn):
    model = detr_tiny(num_classes=3)
    model.train()
    model.decoder.eval()
    modes, means = [part.training for part in model.modules()], [value.clone() for value in running_means(model)]
    seen = mode_evidence(model, next(iter(drawn.loader(4).epoch(0))), SetCriterion(3))
    assert [part.training for part in model.modules()] == modes
    assert all(map(torch.equal, means, running_means(model)))
    assert seen["loss_as_trained"] != seen["loss_as_used"]
    with pytest.raises(RuntimeError), in_mode(model, False):
        assert not model.decoder.training and not model.memory.backbone.training
        raise RuntimeError
    assert [part.training for part in model.modules()] == modes


def test_norms_whose_means_fit_give_one_loss(drawn):
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    boxes = torch.full((1, 4, 2, 4), 0.5)
    model.forward = lambda images, pad, targets=None: Output(torch.zeros(1, 4, 2, 4), boxes)
    seen = mode_evidence(model, next(iter(drawn.loader(4).epoch(0))), SetCriterion(3))
    assert seen["loss_as_trained"] == seen["loss_as_used"]


def test_the_log_is_summed_with_the_papers_weights():
    rows = [{"loss_ce": 1.0, "loss_bbox": 1.0, "loss_giou": 1.0, "class_error": 5.0},
            {"loss_ce": 3.0, "loss_bbox": 1.0, "loss_giou": 1.0, "class_error": 4.0}]
    assert log_evidence(rows) == {"loss_first": 8, "loss_last": 10, "loss_peak": 10, "class_error": 4.0}


# --- a run of one's own -------------------------------------------------------------------------------------------
def test_a_run_is_examined_without_harm():
    run = fit(replace(CONFIG, steps=6, evaluations=1))
    before, state = torch.random.get_rng_state(), {k: v.clone() for k, v in run.shown.state_dict().items()}
    seen = collect_evidence(run, images=6)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in run.shown.state_dict().items())
    assert seen["images"] == 22 and seen["steps"] == 6 and all(math.isfinite(value) for value in seen.values())
    assert json.loads(json.dumps(seen)) == seen
    assert diagnose(run, images=6) == findings(seen)


def test_a_run_that_made_no_step_can_be_examined():
    train, _ = CONFIG.data.load()
    run = create_run(CONFIG, train)
    assert "frozen" in [finding.name for finding in diagnose(run, images=4)]


def test_the_callback_speaks_once_and_only_if_ap_stays_at_zero():
    said = []
    fit(replace(CONFIG, steps=8, evaluations=8, ema=0), watch=DiagnosisCallback(said.append))
    assert len(said) == 1 and said[0].startswith("step 4: AP is 0.000. What an examination says:\n")

    run = create_run(CONFIG, CONFIG.data.load()[0])
    run.step = CONFIG.steps
    for row in ({"metrics": {"AP": 0.3}}, {"metrics": {"AP": math.nan}}, {"total": 1.0}):
        run.history = [row]
        DiagnosisCallback(said.append)(run)
    assert len(said) == 1


def test_an_examination_that_fails_does_not_end_the_training():
    @dataclass(frozen=True)
    class Gone(Drawn):
        """Scenes that can be loaded once."""

        loads: list = field(default_factory=list)

        def load(self):
            """Fail from the second time on."""
            self.loads.append(1)
            if len(self.loads) > 1:
                raise OSError("the disk is gone")
            return super().load()

    said = []
    run = fit(replace(CONFIG, data=Gone(), steps=8, evaluations=8, ema=0), watch=DiagnosisCallback(said.append))
    assert run.step == 8 and len(said) == 1 and "could not be examined (OSError: the disk is gone)" in said[0]


def test_findings_are_lines_for_people():
    assert format_findings([Finding("a", "b", "c")]) == "- a: b. What to do: c"
    assert "nothing was found" in format_findings([])
