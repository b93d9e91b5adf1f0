"""The explorables: their JavaScript against the library, their files, and their behaviour in a browser."""

import ast
import base64
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from built import HTML, need
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close
from torchvision.ops import batched_nms

from detr_nb.attention import HeadProjections, attention_weights
from detr_nb.boxes import cxcywh_to_xyxy, giou, iou
from detr_nb.data import Preprocess
from detr_nb.family.anchor import AnchorDETR
from detr_nb.family.conditional import ConditionalDETR
from detr_nb.family.dab import DABDETR
from detr_nb.family.deformable import DeformableDETR
from detr_nb.family.denoising import DNDETR
from detr_nb.family.dino import DINO
from detr_nb.family.smca import SMCADETR
from detr_nb.family.two_stage import ProposingQueries, TwoStageDETR, grid_boxes
from detr_nb.insight import attention_maps, capture_attention, share_inside
from detr_nb.matcher import HungarianMatcher, pad_targets
from detr_nb.model import DETR, DETRConfig, TinyConfig, detr_tiny
from detr_nb.notation import Output, Target, toy_image
from detr_nb.positions import SinePositions
from detr_nb.shapes import DEFAULT, Scenes

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "detr_nb" / "static"
PAGE = "nbs/91_explorables.html"
NODE = shutil.which("node")
FIGURES = ("two_boxes", "matching", "addressing", "layers", "attending", "gazing", "filming", "placing",
           "sampling", "proposing")

if os.environ.get("CI") != "true":
    pytest.importorskip("anywidget", reason="the explorables need anywidget: pip install 'detr-nb[book]'")
from detr_nb import explorables  # noqa: E402

SCENE, _ = Scenes(DEFAULT, 1, seed=123)[0]


def run_node(script: str, data=None):
    """What a piece of JavaScript prints as JSON; `data` is at hand there, and `from(name)` imports a script of ours."""
    need(NODE, "no node to run the JavaScript with")
    head = f"const from = (name) => import({json.dumps(STATIC.as_uri() + '/')} + name + '.js');\n"
    head += "import { readFileSync } from 'node:fs'; const data = JSON.parse(readFileSync(0, 'utf8'));\n"
    command = [NODE, "--input-type=module", "-e", head + script]
    result = subprocess.run(command, input=json.dumps(data), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def random_boxes(n: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    size = 0.05 + 0.6 * torch.rand(n, 2, generator=draw, dtype=torch.float64)
    return torch.cat((size / 2 + (1 - size) * torch.rand(n, 2, generator=draw, dtype=torch.float64), size), -1)


# --- the mathematics ----------------------------------------------------------------------------------------------
def test_nodes_own_tests_pass():
    need(NODE, "no node to run the JavaScript with")
    files = sorted(str(path) for path in (ROOT / "tests" / "js").glob("*.test.mjs"))
    result = subprocess.run([NODE, "--test", *files], capture_output=True, text=True, timeout=300)
    assert len(files) >= 5 and result.returncode == 0, result.stdout[-4000:]


def pairs_with_ties() -> tuple[torch.Tensor, torch.Tensor]:
    """Random pairs; pairs on a coarse grid, where edges fall together; equal boxes; a box in a box.

    Boxes that only touch are left out: there versions of PyTorch differ on the slope of `clamp`, and each is right.
    """
    a, b = random_boxes(300, 0), random_boxes(300, 1)
    coarse = [(boxes * 8).round().clamp(min=1) / 8 for boxes in (random_boxes(200, 2), random_boxes(200, 3))]
    inner = torch.cat((a[:50, :2], a[:50, 2:] / 2), -1)
    first, second = torch.cat((a, coarse[0], a[:20], a[:50])), torch.cat((b, coarse[1], a[:20], inner))
    one, two = cxcywh_to_xyxy(first), cxcywh_to_xyxy(second)
    touch = (torch.minimum(one, two)[:, 2:] == torch.maximum(one, two)[:, :2]).any(1)
    assert 100 < (~touch[300:500]).sum() < 200
    return first[~touch], second[~touch]


def test_measures_and_slopes_are_those_of_the_library():
    predictions, targets = pairs_with_ties()
    found = run_node(
        "const { measures, slopes } = await from('geometry');"
        "console.log(JSON.stringify(data.map(([a, b]) => [measures(a, b), slopes(a, b)])))",
        torch.stack((predictions, targets), 1).tolist(),
    )
    boxes = predictions.clone().requires_grad_()
    corners, true = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets)
    ours = {"iou": iou(corners, true), "giou": giou(corners, true), "l1": (boxes - targets).abs().sum(-1)}
    for name, values in ours.items():
        loss = values if name == "l1" else 1 - values
        (slope,) = torch.autograd.grad(loss.sum(), boxes, retain_graph=True)
        theirs = torch.tensor([measures[name] for measures, _ in found], dtype=torch.float64)
        assert_close(theirs, values.detach(), atol=1e-6, rtol=0)
        theirs = torch.tensor([slopes[name] for _, slopes in found], dtype=torch.float64)
        assert_close(theirs, slope, atol=1e-6, rtol=1e-6)


def test_the_solver_is_as_good_as_scipys():
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=rng.integers(1, 12, 2)) for _ in range(300)]
    tables += [rng.random((100, 7)), rng.random((40, 40))]
    script = "const { assign } = await from('assignment'); console.log(JSON.stringify(data.map(assign)))"
    for table, pairs in zip(tables, run_node(script, [table.tolist() for table in tables]), strict=True):
        assert pairs == np.stack(linear_sum_assignment(table), 1).tolist()


def test_ties_cost_what_scipys_choice_costs():
    rng = np.random.default_rng(1)
    tables = [rng.integers(0, 3, rng.integers(1, 9, 2)).astype(float) for _ in range(200)]
    script = "const { assign } = await from('assignment'); console.log(JSON.stringify(data.map(assign)))"
    for table, pairs in zip(tables, run_node(script, [table.tolist() for table in tables]), strict=True):
        rows, columns = np.array(pairs).T
        assert table[rows, columns].sum() == table[linear_sum_assignment(table)].sum()
        assert len(set(rows)) == len(set(columns)) == min(table.shape)


def test_costs_and_matches_are_those_of_the_matcher():
    boxes, truth = random_boxes(6, 4), random_boxes(4, 5)
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    out = Output(logits[None, None].float(), boxes[None, None].float())
    target, matcher = Target(labels=labels, boxes=truth.float()), HungarianMatcher(1.5, 4, 2.5)
    shares = logits.softmax(-1).tolist()
    guesses = [{"box": box, "probabilities": p} for box, p in zip(boxes.tolist(), shares, strict=True)]
    targets = [{"box": box, "label": label} for box, label in zip(truth.tolist(), labels.tolist(), strict=True)]
    cost, pairs = run_node(
        "const { assign, costTable } = await from('assignment');"
        "const cost = costTable(...data, { classWeight: 1.5, l1Weight: 4, giouWeight: 2.5 });"
        "console.log(JSON.stringify([cost, assign(cost)]))",
        [guesses, targets],
    )
    assert_close(torch.tensor(cost), matcher.cost(out, pad_targets([target], out.boxes))[0, 0], atol=1e-5, rtol=0)
    ((queries, ids),) = matcher(out, [target])[0]
    assert pairs == torch.stack((queries, ids), 1).tolist()


@pytest.mark.parametrize(("rows", "columns", "d", "temperature"), [(6, 8, 32, 20), (12, 16, 256, 10000), (1, 5, 8, 1)])
def test_addresses_are_those_of_the_library(rows, columns, d, temperature):
    script = "const { addresses } = await from('positions'); console.log(JSON.stringify(addresses(...data)))"
    found = torch.tensor(run_node(script, [rows, columns, d, temperature]), dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        ours = SinePositions(d, temperature)(torch.zeros(1, rows, columns, dtype=torch.bool))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(found, ours[0].flatten(0, 1), atol=1e-6, rtol=0)


def test_suppression_is_torchvisions():
    boxes, draw = random_boxes(60, 6), torch.Generator().manual_seed(0)
    scores, labels = torch.rand(60, generator=draw), torch.randint(3, (60,), generator=draw)
    script = "const { suppress } = await from('suppression'); console.log(JSON.stringify(suppress(...data, 0.5)))"
    kept = run_node(script, [boxes.tolist(), scores.tolist(), labels.tolist()])
    assert kept == batched_nms(cxcywh_to_xyxy(boxes), scores.double(), labels, 0.5).tolist() and len(kept) < 60


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_shares_are_those_of_the_library(heads):
    cells = explorables.describe_cells(toy_image()).double()
    split = HeadProjections(8, heads).split(cells[None])
    ours = attention_weights(1.7 * split, split)[0, :, 9]
    script = "const { shares } = await from('attention'); console.log(JSON.stringify(shares(...data)))"
    found = run_node(script, [cells[9].tolist(), cells.tolist(), heads, 1.7])
    assert_close(torch.tensor(found, dtype=torch.float64), ours, atol=1e-6, rtol=0)


def test_packed_shares_come_back():
    weights = (3 * torch.randn(7, 30, generator=torch.Generator().manual_seed(0))).softmax(-1)
    script = "const { unpack } = await from('attention'); console.log(JSON.stringify(unpack(data, 30)))"
    assert_close(torch.tensor(run_node(script, explorables.packed(weights))), weights, atol=4e-3, rtol=0.02)


def test_what_attention_says_in_numbers_is_what_the_library_says():
    draw = torch.Generator().manual_seed(0)
    weights, boxes = torch.randn(20, 6 * 8, generator=draw).double().softmax(-1), random_boxes(20, 7)
    middles = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (6, 8)]
    rows, columns = torch.cartesian_prod(*middles).unbind(1)
    xy = torch.stack((columns, rows), -1)
    script = ("const { meanDistance, shareInside } = await from('looking'); console.log(JSON.stringify(data.map("
              "([w, box]) => [shareInside(w, box, 6, 8), meanDistance(w, box.slice(0, 2), 6, 8)])))")
    inside, distance = torch.tensor(run_node(script, list(zip(weights.tolist(), boxes.tolist(), strict=True)))).T
    assert_close(inside, share_inside(weights[None, None], xy[None], boxes[None])[0, 0], check_dtype=False)
    assert_close(distance, (weights * torch.cdist(boxes[:, :2], xy)).sum(1), check_dtype=False)


# --- files and Python ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FIGURES)
def test_a_joined_script_is_one_sound_module(name, tmp_path):
    need(NODE, "no node to run the JavaScript with")
    text = explorables.joined(name)
    assert not re.findall(r"^import ", text, re.M)
    assert re.findall(r"^export .*", text, re.M) == ["export default { render };"]
    (tmp_path / "joined.mjs").write_text(text)
    script = "const found = await import(data); console.log(JSON.stringify(typeof found.default.render))"
    assert run_node(script, (tmp_path / "joined.mjs").as_uri()) == "function"  # a name used twice would be an error


def test_joining_takes_each_script_once_and_after_what_it_needs():
    order = explorables.scripts("matching")
    assert len(order) == len(set(order)) and order[-1] == "matching"
    assert order.index("geometry") < order.index("assignment") and order.index("stage") < order.index("movable")


def test_every_script_belongs_to_a_figure_and_fetches_nothing():
    used = {part for name in FIGURES for part in explorables.scripts(name)}
    assert used == {path.stem for path in STATIC.glob("*.js")}
    for path in STATIC.iterdir():
        assert set(re.findall(r"https?://[^\"'\s)]+", path.read_text("utf8"))) <= {"http://www.w3.org/2000/svg"}
    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 110_000


def test_without_anywidget_the_message_says_what_to_install():
    code = "import sys; sys.modules['anywidget'] = None\nimport detr_nb.explorables"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'detr-nb[book]'" in result.stderr.splitlines()[-1]


def test_nothing_else_of_the_library_needs_the_explorables():
    for path in (ROOT / "detr_nb").rglob("*.py"):
        names = {getattr(node, "module", "") or "" for node in ast.walk(ast.parse(path.read_text("utf8")))
                 if isinstance(node, ast.ImportFrom)}
        assert not any("explorables" in name for name in names), path.name


def film_of(model, image, target) -> dict:
    """Two copies: the model as it is, and with its queries in another order."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    turned = {**weights, "queries.embedding.weight": weights["queries.embedding.weight"].roll(1, 0)}
    return explorables.record_film(model, {0: turned, 50: weights}, image, target)


MEMBERS = {"Conditional": ConditionalDETR, "Anchor": AnchorDETR, "DAB": DABDETR, "SMCA": SMCADETR, "DN": DNDETR}


@functools.cache
def member(kind: type[DETRConfig]) -> DETR:
    """A small one with random weights, none of them zero, for pictures of 64 x 64 pixels."""
    torch.manual_seed(0)
    sizes = {"num_queries": 5, "hidden_dim": 32, "nheads": 2, "enc_layers": 1, "dec_layers": 3, "dim_feedforward": 32}
    model = kind(TinyConfig((8, 8, 16), (4, 8, 8)), **sizes).build(6)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.preprocess = Preprocess(size=(64, 64))
    return model


def sampler(kind: type[DETRConfig], classes: int = 6, **more: object) -> DETR:
    """A small one that samples two levels, of 8 x 8 and 4 x 4 cells."""
    torch.manual_seed(0)
    sizes = {"num_queries": 5, "hidden_dim": 32, "nheads": 2, "enc_layers": 1, "dec_layers": 3, "dim_feedforward": 32,
             "dropout": 0.0, "num_feature_levels": 2, "num_backbone_outs": 1}
    model = kind(TinyConfig((8, 8, 16), (4, 8, 8)), **sizes, **more).build(classes)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.preprocess = Preprocess(size=(64, 64))
    return model.eval()


SAMPLERS = {"plain": (DeformableDETR, {}), "refined": (DeformableDETR, {"with_box_refine": True}),
            "two stages": (TwoStageDETR, {}), "DINO": (DINO, {})}


@functools.cache
def sampled(name: str = "plain") -> dict:
    """A record of points."""
    kind, more = SAMPLERS[name]
    return explorables.SamplingView.record(sampler(kind, **more), SCENE, grid=4)


@functools.cache
def proposed(kind: type[DETRConfig] = TwoStageDETR) -> dict:
    """A record of proposals."""
    return explorables.ProposalView.record(sampler(kind), SCENE)


@functools.cache
def placed() -> dict:
    """A record of all members."""
    return explorables.record_places({name: member(kind) for name, kind in MEMBERS.items()}, SCENE, grid=4)


@functools.cache
def figures() -> dict[str, object]:
    model, scenes = detr_tiny(pretrained=True), Scenes(DEFAULT, 20, seed=123)
    return {
        "two_boxes": explorables.TwoBoxes(), "matching": explorables.Matching(), "addressing": explorables.Positions(),
        "attending": explorables.Attention(),
        "layers": explorables.Layers(scenes=[explorables.record_scene(model, *scenes[13])], names=model.names),
        "gazing": explorables.Gaze(record=explorables.record_gaze(model, scenes[16][0]), names=model.names),
        "filming": explorables.Film(record=film_of(model, *scenes[16]), names=model.names),
        "placing": explorables.PlaceView(record=placed(), names=model.names, place=[1, 1]),
        "sampling": explorables.SamplingView(recorded=sampled(), names=model.names, place=[1, 1]),
        "proposing": explorables.ProposalView(recorded=proposed(), names=model.names),
    }


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_carries_a_picture_and_words(name):
    data, metadata = figures()[name]._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and len(data["image/png"]) < 400_000
    assert metadata["image/png"]["alt"] == data["text/plain"] and len(data["text/plain"]) > 40
    assert "application/vnd.jupyter.widget-view+json" in data


def test_a_film_says_who_is_matched_at_each_copy():
    """Queries in another order answer in another order, so every object changes its query by one place."""
    model, (image, target) = detr_tiny(pretrained=True), Scenes(DEFAULT, 20, seed=123)[16]
    first, second = film_of(model, image, target)["frames"]
    assert (first["step"], second["step"]) == (0, 50) and len(first["matched"]) == len(target["labels"])
    assert [(query + 1) % 16 for query in second["matched"]] == first["matched"]
    with torch.no_grad():
        out = model(model.preprocess(image)[None])
    ((queries, ids),) = HungarianMatcher()(out, [target])[-1]
    assert [second["matched"][i] for i in ids.tolist()] == queries.tolist()
    assert len(json.dumps(second)) < 2000


def test_a_record_says_what_the_model_says_and_is_small():
    model, (image, target) = detr_tiny(pretrained=True), Scenes(DEFAULT, 20, seed=123)[13]
    with torch.no_grad():
        out = model(model.preprocess(image)[None])
    record = explorables.record_scene(model, image, target)
    for layer, boxes in zip(record["layers"], out.boxes[:, 0], strict=True):
        assert_close(torch.tensor(layer["boxes"]), boxes, atol=1e-4, rtol=0)
    assert len(json.dumps(record)) < 20_000
    gaze = figures()["gazing"].record
    assert len(json.dumps(gaze)) < 150_000 and len(gaze["decoder"]) == 4 and len(gaze["objects"]) == 7


def test_recording_leaves_the_model_as_it_was():
    model = detr_tiny(pretrained=True)
    explorables.record_gaze(model, Scenes(DEFAULT, 20, seed=123)[0][0])
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_packed_shares_come_back_in_python_too():
    weights = (3 * torch.randn(7, 30, generator=torch.Generator().manual_seed(0))).softmax(-1)
    found = torch.tensor(explorables.decode_weights(explorables.encode_weights(weights), (5, 6)))
    assert_close(found.flatten(1), weights, atol=4e-3, rtol=0.02, check_dtype=False)


def check_layer(layer: dict, weights: torch.Tensor, logits: torch.Tensor, boxes: torch.Tensor) -> None:
    """A recorded layer against the answers of a model with sigmoid scores, one row for each place."""
    found = torch.tensor(explorables.decode_weights(layer["weights"], (8, 8))).flatten(1)
    assert_close(found, weights, atol=4e-3, rtol=0.02, check_dtype=False)
    assert_close(torch.tensor(layer["boxes"]), boxes, atol=6e-4, rtol=0)
    scores, labels = logits.sigmoid().max(-1)
    assert_close(torch.tensor(layer["scores"]), scores, atol=6e-4, rtol=0)
    assert layer["labels"] == labels.tolist()


@pytest.mark.parametrize("kind", MEMBERS.values())
def test_a_query_at_its_own_place_says_what_the_model_says(kind):
    model = member(kind)
    images = model.preprocess(SCENE)[None]
    with torch.no_grad():
        memory = model.eval().encoder(model.memory(images, torch.zeros(1, 64, 64, dtype=torch.bool), None))
        own = model.queries(memory).ref[:, 0]
    record = explorables.record_member(model, SCENE, [torch.cat((own, torch.full((1, 4), 0.3)), 1)[:, :4]])
    maps = attention_maps(model, images, roles=("cross",))
    assert_close(torch.tensor(record["home"]), own[0, :2], atol=6e-4, rtol=0)
    for name, layer in (("first", 0), ("last", -1)):
        logits, boxes = maps.out.logits[layer, :, 0, :6], maps.out.boxes[layer, :, 0]  # SMCA has a spare column
        check_layer(record[name], maps.cross[layer, :, :, 0].mean(1), logits, boxes)


@pytest.mark.parametrize("kind", MEMBERS.values())
def test_a_moved_query_says_what_the_decoder_says_from_there(kind):
    """The slow way: memory, queries, another reference for the first one, decoder; place by place."""
    model, name = member(kind), next(name for name, other in MEMBERS.items() if other is kind)
    record = next(one for one in placed()["members"] if one["name"] == name)
    pad, images = torch.zeros(1, 64, 64, dtype=torch.bool), model.preprocess(SCENE)[None]
    with torch.no_grad():
        memory = model.eval().encoder(model.memory(images, pad, None))
        queries = model.queries(memory)
        for place, (x, y) in {1: (0.375, 0.125), 8: (0.125, 0.625), 15: (0.875, 0.875)}.items():
            ref = queries.ref.clone()
            ref[0, 0] = torch.tensor([x, y, 0.3, 0.3])[: ref.shape[-1]]
            out = model.decoder(queries._replace(ref=ref), memory)
            for layer, i in (("first", 0), ("last", -1)):
                assert_close(torch.tensor(record[layer]["boxes"][place]), out.boxes[i, 0, 0], atol=6e-4, rtol=0)
    assert not torch.equal(*(torch.tensor(record["first"]["boxes"][place]) for place in (1, 8)))


def test_only_one_query_is_moved_and_the_model_stays_as_it_was():
    model = member(DABDETR).train()
    with explorables.moved_query(model, torch.full((1, 4), 0.25)) as own:
        images = model.preprocess(SCENE)[None]
        seen = []
        handle = model.decoder.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].ref[0]))
        with torch.no_grad():
            model.eval()(images)
        handle.remove()
    (ref,) = seen
    places = model.queries.places()
    assert_close(ref[0], torch.full((4,), 0.25))
    assert_close(ref[1:], places[1:])
    assert_close(own[0], places[0])
    model.train()
    explorables.record_places({"DAB": model}, SCENE, grid=2)
    assert model.training and not model.queries._forward_hooks


def test_without_a_reference_nothing_can_be_moved():
    model = detr_tiny(pretrained=True)
    with pytest.raises(ValueError, match="the queries of DETRConfig have no reference"):
        explorables.record_places({"DETR": model}, SCENE)
    assert not model.queries._forward_hooks


@pytest.mark.parametrize("wrong", [{"grid": 0}, {"side": 0.0}, {"side": 1.5}])
def test_a_place_needs_a_grid_and_a_size(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        explorables.record_places({"DAB": member(DABDETR)}, SCENE, **wrong)


@pytest.mark.parametrize(("change", "complaint"), [
    ({"record": {}}, "record"), ({"member": 5}, "member"), ({"place": [0, 4]}, "place"), ({"place": [4, 0]}, "place"),
])
def test_a_place_that_was_not_recorded_is_refused(change, complaint):
    with pytest.raises(ValueError, match=rf"PlaceView\.{complaint} is"):
        explorables.PlaceView(**{"record": placed(), **change})


def test_places_of_five_members_fit_a_page():
    """16 by 16 cells, as a picture of 128 x 128 pixels has them."""
    models = {name: member(kind) for name, kind in MEMBERS.items()}
    with pytest.MonkeyPatch.context() as patch:
        for model in models.values():
            patch.setattr(model, "preprocess", Preprocess(size=(128, 128)))
        record = explorables.record_places(models, SCENE)
    assert {(one["rows"], one["columns"]) for one in record["members"]} == {(16, 16)}
    assert len(json.dumps(record)) < 200_000


def answers_of(model: DETR, layer: int, place: tuple[float, float] | None = None) -> tuple:
    """The slow way: memory, queries, another reference for the first, decoder; what its attention in one layer looks at
    (points and weights), and what it says there."""
    pad, images = torch.zeros(1, 64, 64, dtype=torch.bool), model.preprocess(SCENE)[None]
    with torch.no_grad():
        memory = model.eval().encoder(model.memory(images, pad, None))
        queries = model.queries(memory)
        if place:
            queries.ref[0, 0] = torch.tensor([*place, 0.3, 0.3])[: queries.ref.shape[-1]]
        with capture_attention({"cross": [model.attentions()["cross"][layer]]}) as seen:
            out = model.decoder(queries, memory)
    ((points, weights),) = seen["cross"]
    return points[0, 0], weights[0, 0], out.logits[layer, 0, 0], out.boxes[layer, 0, 0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_recorded_points_are_those_of_the_attention(name):
    """And the box and the class are the decoder's from there."""
    kind, more = SAMPLERS[name]
    model, record = sampler(kind, **more), sampled(name)
    assert (record["shapes"], record["heads"], record["grid"]) == ([[8, 8], [4, 4]], 2, 4)
    for row, column in ((0, 1), (2, 0), (3, 3)):
        figure, number = explorables.SamplingView(recorded=record, place=[row, column]), 4 * row + column
        for layer, i in (("first", 0), ("last", -1)):
            points, weights, logits, box = answers_of(model, i, ((column + 0.5) / 4, (row + 0.5) / 4))
            found = figure.samples(layer)
            assert found[0].shape == (2, 2, 4, 2)
            assert_close(found[0], points, atol=1e-4, rtol=0)
            assert_close(found[1], weights, atol=4e-3, rtol=0.02)
            said = record[layer]
            assert_close(torch.tensor(said["boxes"][number]), box, atol=6e-4, rtol=0)
            score, label = logits.sigmoid().max(-1)
            assert said["labels"][number] == label and abs(said["scores"][number] - score) < 6e-4
    assert record["first"]["points"] != record["last"]["points"]


def test_the_first_reference_is_the_place_and_the_last_of_a_refining_member_a_box():
    middles = [[x, y] for y in (0.125, 0.375, 0.625, 0.875) for x in (0.125, 0.375, 0.625, 0.875)]
    for name in ("plain", "refined"):
        assert_close(torch.tensor(sampled(name)["first"]["refs"]), torch.tensor(middles), atol=6e-4, rtol=0)
    assert sampled("plain")["last"]["refs"] == sampled("plain")["first"]["refs"]
    assert {len(ref) for ref in sampled("refined")["last"]["refs"]} == {4}
    model = sampler(DeformableDETR)
    with torch.no_grad():
        assert_close(torch.tensor(sampled()["home"]), model.queries(one_cell(model)).ref[0, 0], atol=6e-4, rtol=0)


def one_cell(model: DETR):
    """Any memory: these queries do not read it."""
    with torch.no_grad():
        return model.memory(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool), None)


def test_in_the_first_layer_the_pattern_of_points_moves_as_one_piece():
    """What chapter 37 says: offsets and weights come from the query alone, which has read nothing yet."""
    record = sampled()
    refs = torch.tensor(record["first"]["refs"])[:, None].double()
    points = torch.tensor(explorables.decode_numbers(record["first"]["points"])).reshape(16, -1, 2)
    assert ((points - refs).std(0) < 1e-3).all()
    last = torch.tensor(explorables.decode_numbers(record["last"]["points"])).reshape(16, -1, 2)
    assert (last - refs).std(0).mean() > 1e-3


@pytest.mark.parametrize("kind", [TwoStageDETR, DINO])
def test_recorded_proposals_are_what_the_cells_propose(kind):
    model, record = sampler(kind), proposed(kind)
    part = next(part for part in model.modules() if isinstance(part, ProposingQueries))
    pad, images = torch.zeros(1, 64, 64, dtype=torch.bool), model.preprocess(SCENE)[None]
    with torch.no_grad():
        memory = model.encoder(model.memory(images, pad, None))
        found, (start, proper), out = part.propose(memory), grid_boxes(memory), model(images)
    score = found.logits[0, :, 0] if kind is TwoStageDETR else found.logits[0].amax(-1)
    starts, said = (torch.tensor(explorables.decode_numbers(record[key])).float() for key in ("start", "said"))
    assert_close(starts.reshape(-1, 4), start[0], atol=1e-4, rtol=0)
    said = said.reshape(-1, 5)
    assert_close(said[:, :4], found.boxes[0], atol=1e-4, rtol=0)
    assert_close(said[:, 4], score.sigmoid(), atol=1e-4, rtol=0)
    assert record["chosen"] == score.topk(5).indices.tolist()
    assert record["blind"] == (~proper[0]).nonzero().flatten().tolist()
    assert record["shapes"] == [[8, 8], [4, 4]] and len(record["layers"]) == 3
    with torch.no_grad():
        assert_close(said[record["chosen"], :4], model.queries(memory).ref[0], atol=1e-4, rtol=0)
    for layer, boxes, logits in zip(record["layers"], out.boxes[:, 0], out.logits[:, 0], strict=True):
        assert_close(torch.tensor(layer["boxes"]), boxes, atol=6e-4, rtol=0)
        scores, labels = logits.sigmoid().max(-1)
        assert_close(torch.tensor(layer["scores"]), scores, atol=6e-4, rtol=0)
        assert layer["labels"] == labels.tolist()


def test_recording_points_and_proposals_leaves_the_model_as_it_was():
    model = sampler(TwoStageDETR).train()
    explorables.SamplingView.record(model, SCENE, grid=2)
    explorables.ProposalView.record(model, SCENE)
    assert model.training and "best" not in vars(model.queries)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_what_has_no_points_or_no_proposals_is_refused_by_name():
    model = member(DABDETR)
    with pytest.raises(ValueError, match="the queries of DABDETR look at all cells"):
        explorables.SamplingView.record(model, SCENE)
    with pytest.raises(ValueError, match="the queries of DETRConfig have no reference"):
        explorables.SamplingView.record(detr_tiny(pretrained=True), SCENE)
    with pytest.raises(ValueError, match="the queries of DeformableDETR are not proposed by the image"):
        explorables.ProposalView.record(sampler(DeformableDETR), SCENE)
    with pytest.raises(ValueError, match="grid=0"):
        explorables.SamplingView.record(sampler(DeformableDETR), SCENE, grid=0)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


@pytest.mark.parametrize(("name", "change", "complaint"), [
    ("SamplingView", {"recorded": {}}, "recorded"), ("SamplingView", {"place": [0, 4]}, "place"),
    ("SamplingView", {"head": 2}, "head"), ("SamplingView", {"level": 2}, "level"),
    ("ProposalView", {"recorded": {}}, "recorded"), ("ProposalView", {"stage": 6}, "stage"),
    ("ProposalView", {"query": 5}, "query"), ("ProposalView", {"level": 2}, "level"),
])
def test_what_was_not_recorded_is_refused(name, change, complaint):
    record = sampled() if name == "SamplingView" else proposed()
    with pytest.raises(ValueError, match=rf"{name}\.{complaint} is"):
        getattr(explorables, name)(**{"recorded": record, **change})


def test_points_and_proposals_fit_a_page():
    """16 by 16 and 8 by 8 cells, as a picture of 128 x 128 pixels has them."""
    for kind, view in ((DeformableDETR, explorables.SamplingView), (TwoStageDETR, explorables.ProposalView)):
        model = sampler(kind)
        model.preprocess = Preprocess(size=(128, 128))
        record = view.record(model, SCENE)
        assert record["shapes"] == [[16, 16], [8, 8]] and len(json.dumps(record)) < 60_000


def test_numbers_in_two_bytes_come_back():
    numbers = 3 * torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    told = explorables.encode_numbers(numbers)
    step = (told["high"] - told["low"]) / 65535
    here = torch.tensor(explorables.decode_numbers(told))
    assert_close(here, numbers.flatten().double(), atol=step, rtol=0)
    script = "const { unpackNumbers } = await from('points'); console.log(JSON.stringify(unpackNumbers(data)))"
    assert_close(torch.tensor(run_node(script, told), dtype=torch.float64), here)
    same = explorables.encode_numbers(torch.full((4,), 0.25))
    assert_close(torch.tensor(explorables.decode_numbers(same)), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("layer", ["first", "last"])
def test_what_points_say_in_numbers_is_what_the_library_says(layer):
    """Weight, distance and the counts by level and for all, from the same record."""
    record, place = sampled("refined"), 6
    figure = explorables.SamplingView(recorded=record, place=[1, 2])
    points, weights = (part.double() for part in figure.samples(layer))  # h l p 2, h l p
    ref, box = (torch.tensor(record[layer][key][place]).double() for key in ("refs", "boxes"))
    script = """const { rowsOf, samplesOf, summed, unpackNumbers } = await from('points');
      const { unpack } = await from('attention'); const [told, weights, ref, box, place] = data;
      const points = rowsOf(rowsOf(unpackNumbers(told), 2), 16)[place];
      const shares = rowsOf(rowsOf(unpack(weights, 8), 1).flat(), 2)[place];
      const samples = samplesOf(points, shares, 2, 2);
      console.log(JSON.stringify([0, 1, null].map((level) =>
        summed(samples.filter((one) => level === null || one.level === level), ref, box))))"""
    said = record[layer]
    found = run_node(script, [said["points"], said["weights"], ref.tolist(), box.tolist(), place])
    for level, one in zip((slice(0, 1), slice(1, 2), slice(None)), found, strict=True):
        p, w = points[:, level], weights[:, level] / 2
        assert one["weight"] == pytest.approx(float(w.sum()), abs=1e-4)
        far = ((p - ref[:2]).norm(dim=-1) * w).sum() / w.sum()
        assert one["distance"] == pytest.approx(float(far), abs=1e-4)
        x0y0x1y1 = cxcywh_to_xyxy(box)
        assert one["inside"] == int(((p >= x0y0x1y1[:2]) & (p <= x0y0x1y1[2:])).all(-1).sum())
        assert one["outside"] == int(((p < 0) | (p > 1)).any(-1).sum())


# --- in a browser -------------------------------------------------------------------------------------------------
class Quiet(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/favicon.ico":  # every browser asks for one
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder: Path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def opened(browser, **options):
    page = browser.page((HTML / PAGE).as_uri(), **options)
    page.wait(f"document.querySelectorAll('.xp').length === {len(FIGURES)}")
    return page


STAND_IN = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>body { margin: 8px } %s</style><body><script type="module">%s
const heard = {};
window.values = %s;
render({ el: document.body, model: {
  get: (name) => values[name], save_changes: () => null, on: (name, call) => (heard[name] ??= []).push(call),
  set: (name, value) => { values[name] = value; (heard[`change:${name}`] ?? []).forEach((call) => call()); },
} });
</script>"""


def alone(browser, figure, folder: Path, **options):
    """A page with one figure and nothing else; `values` there are what Python would share with it."""
    script = figure._esm.replace("export default { render };", "")
    values = {name: getattr(figure, name) for name in figure.trait_names(sync=True) if not name.startswith("_")}
    values = {name: value for name, value in values.items() if isinstance(value, dict | list | str | int | float)}
    (folder / "alone.html").write_text(STAND_IN % (figure._css, script, json.dumps(values)), "utf8")
    page = browser.page((folder / "alone.html").as_uri(), **options)
    page.wait("document.querySelectorAll('.xp').length === 1")
    return page


def words(page, figure: int) -> str:
    return page.evaluate(f"document.querySelectorAll('.xp')[{figure}].querySelector('.xp-words').textContent")


def place_of(page, selector: str) -> list[float]:
    """Centre and size of a movable box, from what it says of itself."""
    label = page.evaluate(f"document.querySelector('{selector}').getAttribute('aria-label')")
    return [float(number) for number in re.findall(r"\d\.\d\d", label)]


# The theme says this on a first visit.
KNOWN = ("Got invalid theme mode: . Resetting to auto.",)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "http"])
def test_all_figures_appear_without_an_error_and_without_a_foreign_host(browser, way):
    with served(HTML) if way == "http" else contextlib.nullcontext(HTML.as_uri()) as root:
        page = browser.page(f"{root}/{PAGE}")
        page.wait(f"document.querySelectorAll('.xp').length === {len(FIGURES)}")
        page.rest(0.5)
        assert [error for error in page.errors if error not in KNOWN] == []
        assert [url for url in page.fetched if not url.startswith((root, "data:", "blob:"))] == []
        page.close()


@pytest.mark.slow
def test_a_box_follows_the_pointer_and_the_keyboard(browser):
    page = opened(browser)
    before, said = place_of(page, ".xp-prediction"), words(page, 0)
    page.drag(page.centre(".xp-prediction .xp-inside"), 30, 20)
    after = place_of(page, ".xp-prediction")
    assert after[0] > before[0] and after[1] > before[1] and after[2:] == before[2:] and words(page, 0) != said
    assert page.evaluate("document.activeElement === document.querySelector('.xp-prediction')")
    for _ in range(3):
        page.press("ArrowLeft")
    page.press("ArrowDown", shift=True)
    moved = place_of(page, ".xp-prediction")
    assert [round(x - y, 2) for x, y in zip(moved, after, strict=True)] == [-0.03, 0, 0, 0.01]
    page.drag(page.centre(".xp-prediction .xp-grip", 3), 20, 20)
    larger = place_of(page, ".xp-prediction")
    assert larger[2] > moved[2] and larger[3] > moved[3]
    page.rest(0.8)
    assert page.evaluate("document.querySelector('.xp-spoken').textContent") == words(page, 0)
    assert [error for error in page.errors if error not in KNOWN] == []
    page.close()


@pytest.mark.slow
def test_the_first_tab_into_a_figure_reaches_a_box_that_shows_its_focus(browser):
    page = opened(browser)
    page.evaluate("document.querySelector('.xp-target').focus()")
    page.press("Tab")
    assert page.evaluate("document.activeElement.matches('.xp-prediction:focus-visible')")
    width = "getComputedStyle(document.querySelector('{} .xp-inside')).strokeWidth"
    assert page.evaluate(width.format(".xp-prediction")) != page.evaluate(width.format(".xp-target"))
    page.close()


@pytest.mark.slow
def test_a_finger_moves_a_box_and_not_the_page(browser):
    page = opened(browser, width=390, height=844, touch=True)
    start, before = page.centre(".xp-prediction .xp-inside"), place_of(page, ".xp-prediction")
    scrolled = page.evaluate("scrollY")
    page.swipe(start, 30, 40)
    after = place_of(page, ".xp-prediction")
    assert after[0] > before[0] and after[1] > before[1] and page.evaluate("scrollY") == scrolled
    wide = "Math.max(...[...document.querySelectorAll('.xp, .xp *')].map(e => e.getBoundingClientRect().right))"
    assert page.evaluate(wide) <= 391, "something is wider than the phone"
    page.close()


@pytest.mark.slow
def test_weights_change_the_assignment(browser):
    page = opened(browser)
    assert "pays 1.30 more" in words(page, 1)
    for slider in range(3):  # only the class counts
        script = ("(() => { const s = document.querySelectorAll('.xp')[1].querySelectorAll('input[type=range]')[%d];"
                  "s.value = %s; s.dispatchEvent(new Event('input', { bubbles: true })) })()")
        page.evaluate(script % (slider, "1" if slider == 0 else "0"))
    assert "in sum \u22122.05" in words(page, 1)  # 0.80 and 0.50 for the cats, 0.75 for the dog
    page.close()


@pytest.mark.slow
def test_a_cell_is_chosen_by_hovering_and_by_keys(browser):
    page = opened(browser)
    x, y = page.centre(".xp-cells")
    page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    row, column = re.match(r"Row (\d+), column (\d+)", words(page, 2)).groups()
    assert row in "56" and column in "78"  # the middle of 12 by 16
    page.evaluate("document.querySelector('.xp-cells').focus()")
    page.press("ArrowUp")
    assert words(page, 2).startswith(f"Row {int(row) - 1}, column {column}:")
    page.close()


@pytest.mark.slow
def test_duplicates_vanish_with_the_layers(browser):
    page = opened(browser)
    assert "8 boxes for 6 objects" in words(page, 3)
    page.evaluate("document.querySelectorAll('.xp')[3].querySelector('input[type=range]').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert words(page, 3).startswith("Layer 3: 6 boxes for 6 objects. NMS finds nothing")
    page.close()


@pytest.mark.slow
def test_heads_and_gaze_answer(browser):
    page = opened(browser)
    click = ("document.querySelectorAll('.xp')[{}].querySelectorAll('fieldset')[{}]"
             ".querySelectorAll('input')[{}].click()")
    page.evaluate(click.format(4, 0, 0))
    assert words(page, 4).startswith("One head: row 2, column 1")
    page.evaluate(click.format(5, 0, 0))
    assert words(page, 5).startswith("The cell in row 8, column 8")
    page.close()


@pytest.mark.slow
def test_a_query_is_moved_by_keys(browser):
    page = opened(browser)
    assert "stands 0.50 from the left and 0.50 from the top" in words(page, 7)
    page.evaluate("document.querySelector('.xp-point').focus()")
    page.press("ArrowRight")
    assert "stands 0.64 from the left and 0.50 from the top" in words(page, 7)
    page.close()


@pytest.mark.slow
def test_a_film_can_be_wound_and_a_query_followed(browser):
    page = opened(browser)
    figure = "document.querySelectorAll('.xp')[6]"
    assert re.match(r"Step \d+: \d+ of \d+ objects have another query than at step \d+; ", words(page, 6))
    page.evaluate(figure + ".querySelector('input[type=range]').focus()")
    before = words(page, 6)
    page.press("ArrowRight")
    assert words(page, 6) != before
    assert page.evaluate(figure + ".querySelector('.xp-trail').getAttribute('points')") == ""
    page.evaluate(figure + ".querySelectorAll('input[type=range]')[1].focus()")
    page.press("ArrowRight")
    assert len(page.evaluate(figure + ".querySelector('.xp-trail').getAttribute('points')").split()) > 2
    page.close()


def shown_of(page) -> tuple[torch.Tensor, list[float]]:
    """Shares as the veil shows them, the largest as 1, and the corners of the box, all in shares of the picture."""
    veil, box = page.evaluate("""[[...document.querySelectorAll('.xp-veil')].map(e => e.getAttribute('fill-opacity')),
      ['x', 'y', 'width', 'height'].map(k => document.querySelector('.xp-follows rect').getAttribute(k))]""")
    x, y, w, h = (float(number) / 400 for number in box)
    return (1 - torch.tensor([float(opacity) for opacity in veil]) / 0.78) ** 2, [x, y, x + w, y + h]


def check_shown(page, one: dict, layer: str, place: int) -> None:
    """What is seen of one detector against its record."""
    shares = torch.tensor(explorables.decode_weights(one[layer]["weights"], (8, 8)))[place].flatten()
    veil, corners = shown_of(page)
    assert_close(veil, shares / shares.max(), atol=3e-3, rtol=0, check_dtype=False)
    edges = cxcywh_to_xyxy(torch.tensor(one[layer]["boxes"][place])).clamp(0, 1)
    assert_close(torch.tensor(corners), edges, atol=1e-4, rtol=0)
    score = f"{one[layer]['scores'][place]:.2f}"
    assert f" {score}: centre" in words(page, 0) and words(page, 0).startswith(f"{one['name']}, {layer} decoder layer:")


@pytest.mark.slow
def test_attention_and_box_follow_a_point_that_is_dragged(browser, tmp_path):
    figure = figures()["placing"]
    members, page = placed()["members"], alone(browser, figure, tmp_path)
    check_shown(page, members[0], "last", 5)
    cell = page.evaluate("document.querySelector('.xp-picture').getBoundingClientRect().width") / 4
    page.drag(page.centre(".xp-point"), 1.9 * cell, 0.9 * cell)
    assert page.evaluate("values.place") == [2, 3]
    check_shown(page, members[0], "last", 11)
    assert page.evaluate("document.activeElement.matches('.xp-point')")
    for key in ("ArrowLeft", "ArrowUp", "ArrowUp", "ArrowUp"):  # the last one meets the edge
        page.press(key)
    assert page.evaluate("values.place") == [0, 2]
    label = page.evaluate("document.querySelector('.xp-point').getAttribute('aria-label')")
    assert label == "place of the query: 0.63 from the left and 0.13 from the top"
    for number, one in enumerate(members):
        page.evaluate(f"document.querySelectorAll('fieldset')[0].querySelectorAll('input')[{number}].click()")
        check_shown(page, one, "last", 2)
    page.evaluate("document.querySelectorAll('fieldset')[1].querySelectorAll('input')[0].click()")
    check_shown(page, members[-1], "first", 2)
    rows = page.evaluate("[...document.querySelectorAll('tbody tr')].map(e => [e.innerText, e.className])")
    assert [name for name, chosen in rows if chosen == "xp-chosen"] == [rows[-1][0]] and len(rows) == 5
    for (text, _), one in zip(rows, members, strict=True):
        assert text.startswith(one["name"]) and text.endswith(f"{one['first']['scores'][2]:.2f}")
    page.click(".xp-spot", 12)
    assert page.evaluate("values.place") == [3, 0] and page.errors == []
    page.close()


@pytest.mark.slow
def test_a_finger_moves_the_point_and_not_the_page(browser, tmp_path):
    page = alone(browser, figures()["placing"], tmp_path, width=390, height=500, touch=True)
    start = page.centre(".xp-point")
    scrolled = page.evaluate("scrollY")
    cell = page.evaluate("document.querySelector('.xp-picture').getBoundingClientRect().width") / 4
    page.swipe(start, cell, cell)
    assert page.evaluate("[values.place, scrollY]") == [[2, 2], scrolled]
    wide = "Math.max(...[...document.querySelectorAll('.xp, .xp *')].map(e => e.getBoundingClientRect().right))"
    assert page.evaluate(wide) <= 391, "something is wider than the phone"
    page.close()


def marks_of(page) -> list[tuple[float, float, str]]:
    """Places of the marks in shares of the picture, with their colour."""
    script = """[...document.querySelectorAll('.xp-samples .xp-sample')].map(e =>
      [e.getAttribute('transform'), e.getAttribute('fill')])"""
    places = ((re.findall(r"-?[\d.]+(?:e-?\d+)?", place), tone) for place, tone in page.evaluate(script))
    return [(float(x) / 400, float(y) / 400, tone) for (x, y), tone in places]


def check_marks(page, figure, place: tuple[int, int], layer: str, head: int = -1, level: int = -1) -> None:
    """The marks that are seen against the record: those in the drawing, of the chosen head and level."""
    figure = explorables.SamplingView(recorded=figure.recorded, place=list(place))
    points, _ = figure.samples(layer)
    chosen = points[head if head >= 0 else slice(None)].reshape(-1, 2, 4, 2)
    chosen = chosen[:, level if level >= 0 else slice(None)].reshape(-1, 2)
    near = chosen[((chosen >= -0.1) & (chosen <= 1.1)).all(-1)]
    found = torch.tensor([mark[:2] for mark in marks_of(page)]).reshape(-1, 2)
    assert len(found) == len(near) and torch.cdist(near, found).amin(1).amax() < 1e-3
    box = torch.tensor(figure.recorded[layer]["boxes"][4 * place[0] + place[1]])
    frame = "document.querySelector('.xp-follows rect')"
    edges = page.evaluate(f"['x', 'y', 'width', 'height'].map(name => {frame}.getAttribute(name))")
    x, y, w, h = (float(edge) / 400 for edge in edges)
    assert_close(torch.tensor([x, y, x + w, y + h]), cxcywh_to_xyxy(box).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_points_follow_a_query_that_is_dragged(browser, tmp_path, dark):
    figure = figures()["sampling"]
    page = alone(browser, figure, tmp_path, dark=dark)
    check_marks(page, figure, (1, 1), "last")
    assert len({tone for _, _, tone in marks_of(page)}) == 2
    cell = page.evaluate("document.querySelector('.xp-picture').getBoundingClientRect().width") / 4
    page.drag(page.centre(".xp-point"), 1.9 * cell, 0.9 * cell)
    assert page.evaluate("values.place") == [2, 3]
    check_marks(page, figure, (2, 3), "last")
    for key in ("ArrowLeft", "ArrowUp", "ArrowUp", "ArrowUp"):  # the last one meets the edge
        page.press(key)
    assert page.evaluate("values.place") == [0, 2]
    label = page.evaluate("document.querySelector('.xp-point').getAttribute('aria-label')")
    assert label == "place of the query: 0.63 from the left and 0.13 from the top"
    click = "document.querySelectorAll('fieldset')[{}].querySelectorAll('input')[{}].click()"
    page.evaluate(click.format(0, 0))
    check_marks(page, figure, (0, 2), "first")
    assert words(page, 0).startswith("First decoder layer, all heads: the query stands 0.63 from the left")
    page.evaluate(click.format(1, 2))
    check_marks(page, figure, (0, 2), "first", head=1)
    page.evaluate(click.format(2, 1))
    check_marks(page, figure, (0, 2), "first", head=1, level=0)
    rows = page.evaluate("[...document.querySelectorAll('tbody tr')].map(e => [e.innerText, e.className])")
    assert [name for name, chosen in rows if chosen == "xp-chosen"] == [rows[0][0]] and len(rows) == 3
    assert rows[-1][0].startswith("all\t100 %")
    page.click(".xp-spot", 12)
    assert page.evaluate("values.place") == [3, 0] and page.errors == []
    page.rest(0.8)
    assert page.evaluate("document.querySelector('.xp-spoken').textContent") == words(page, 0)
    page.close()


def boxes_of(page) -> list[list[float]]:
    """Corners of the boxes that are seen, in shares of the picture."""
    script = """[...document.querySelectorAll('.xp-proposal')].filter(e => Number(e.style.opacity) > 0).map(e =>
      ['x', 'y', 'width', 'height'].map(k => Number(e.querySelector('rect').getAttribute(k)) / 400))"""
    return [[x, y, x + w, y + h] for x, y, w, h in page.evaluate(script)]


def check_boxes(page, boxes: torch.Tensor) -> None:
    """The same boxes in any order."""
    found, wanted = torch.tensor(boxes_of(page)), cxcywh_to_xyxy(boxes).clamp(0, 1).float()
    assert len(found) == len(wanted)
    assert torch.cdist(found, wanted).amin(1).amax() < 1e-3 > torch.cdist(found, wanted).amin(0).amax()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_proposal_is_followed_from_its_cell_to_its_last_box(browser, tmp_path, dark):
    figure, record = figures()["proposing"], proposed()
    page = alone(browser, figure, tmp_path, dark=dark)
    starts, said = (torch.tensor(explorables.decode_numbers(record[key])) for key in ("start", "said"))
    starts, said, chosen = starts.reshape(-1, 4), said.reshape(-1, 5), record["chosen"]
    proper = [cell for cell in range(80) if cell not in record["blind"]]
    check_boxes(page, starts[proper])
    page.evaluate("document.querySelectorAll('input[type=range]')[0].focus()")
    for stage, boxes in enumerate((said[proper, :4], said[chosen, :4])):
        page.press("ArrowRight")
        assert page.evaluate("values.stage") == stage + 1
        check_boxes(page, boxes)
    for layer in record["layers"]:
        page.press("ArrowRight")
        check_boxes(page, torch.tensor(layer["boxes"]))
    page.press("ArrowRight")  # there is no further stage
    assert page.evaluate("values.stage") == 5 and words(page, 0).startswith("After decoder layer 3, ")
    page.evaluate("document.querySelector('.xp-cells').focus()")
    page.press("ArrowRight")
    page.press("ArrowDown")
    assert page.evaluate("values.query") == 2
    level = 0 if chosen[2] < 64 else 1
    cell = chosen[2] - 64 * level
    row, column = divmod(cell, 8 if level == 0 else 4)
    assert f"Query 3, from row {row + 1}, column {column + 1} of level {level + 1}, says " in words(page, 0)
    trail = page.evaluate("document.querySelector('.xp-trail').getAttribute('points')").split()
    assert len(trail) == 5  # its square, its proposal, three layers
    x, y = (float(number) / 400 for number in trail[-1].split(","))
    assert_close(torch.tensor([x, y]), torch.tensor(record["layers"][-1]["boxes"][2][:2]), atol=1e-4, rtol=0)
    numbers = page.evaluate("[...document.querySelectorAll('tbody tr')].map(e => e.innerText)")
    assert len(numbers) == 5 and numbers[1].endswith(f"{said[chosen[2], 4]:.2f}")
    for name in ("ArrowLeft",) * 3:  # from the first to the last
        page.press(name)
    assert page.evaluate("values.query") == 4
    own = page.evaluate("document.querySelectorAll('fieldset')[0].querySelectorAll('input')[2].click()")
    assert own is None and page.evaluate("values.level") == 1
    coarse = {cell for cell in chosen if cell >= 64} | {chosen[4]}  # the one that is followed stays in view
    check_boxes(page, torch.tensor([record["layers"][-1]["boxes"][chosen.index(cell)] for cell in sorted(coarse)]))
    assert page.errors == []
    page.close()


@pytest.mark.slow
def test_a_click_follows_the_smallest_box_there_and_again_the_one_behind(browser, tmp_path):
    figure = explorables.ProposalView(recorded=proposed(), names=figures()["proposing"].names, stage=5, query=-1)
    page = alone(browser, figure, tmp_path)
    boxes = torch.tensor(proposed()["layers"][-1]["boxes"])
    small = int(boxes[:, 2:].prod(-1).argmin())
    corners = cxcywh_to_xyxy(boxes)
    inside = ((boxes[small, :2] >= corners[:, :2]) & (boxes[small, :2] <= corners[:, 2:])).all(-1)
    order = [query for query in boxes[:, 2:].prod(-1).argsort().tolist() if inside[query]]
    page.centre(".xp-picture")  # scrolls there
    frame = "document.querySelector('.xp-picture').getBoundingClientRect()"
    x, y, w, h = page.evaluate(f"(r => [r.x, r.y, r.width, r.height])({frame})")
    for query in [*order, order[0]]:
        for kind in ("mousePressed", "mouseReleased"):
            page.mouse(kind, x + w * float(boxes[small, 0]), y + h * float(boxes[small, 1]))
        assert page.evaluate("values.query") == query
    assert page.errors == []
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sampling", "proposing"])
def test_a_figure_of_the_family_fits_a_phone(browser, tmp_path, name):
    page = alone(browser, figures()[name], tmp_path, width=390, height=844, touch=True)
    wide = "Math.max(...[...document.querySelectorAll('.xp, .xp *')].map(e => e.getBoundingClientRect().right))"
    assert page.evaluate(wide) <= 391, "something is wider than the phone"
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_page_and_text_can_be_read(browser, dark):
    page = opened(browser, dark=dark)
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    script = """[...document.querySelectorAll('.xp :is(p, td, th, label, button, caption)')].map(e => {
      const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
      let b = e, back = [0, 0, 0, 0];
      const solid = () => (back = rgb(getComputedStyle(b).backgroundColor), back.length === 3 || back[3] === 1);
      while (b && !solid()) b = b.parentElement;
      return [rgb(getComputedStyle(e).color), back, e.textContent] })"""

    def light(colour):
        parts = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for ink, paper, text in page.evaluate(script):
        high, low = sorted((light(ink), light(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ink, paper)
    page.close()


@pytest.mark.slow
def test_the_switch_of_the_page_wins_over_the_system(browser):
    page = opened(browser, dark=False)
    ground = "getComputedStyle(document.querySelector('.xp')).backgroundColor"
    light = page.evaluate(ground)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert page.evaluate(ground) != light
    page.close()


@pytest.mark.slow
def test_where_no_script_runs_there_is_a_picture(browser):
    page = browser.page((HTML / PAGE).as_uri(), scripts=False)
    page.ask("Emulation.setScriptExecutionDisabled", value=False)
    pictures = "[...document.querySelectorAll('.cell_output noscript img')].map(i => [i.naturalWidth, i.alt])"
    seen = page.evaluate(pictures)
    assert len(seen) == len(FIGURES) and all(width > 200 and alt for width, alt in seen)
    page.close()
