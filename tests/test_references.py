"""References: their logits, their sines, the queries that hold them, and the heads that count from them."""

import ast
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest
import torch
from family import pictures
from small_runs import series
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.conditional_detr.modeling_conditional_detr import (
    inverse_sigmoid as theirs_logit,
)
from transformers.models.dab_detr.modeling_dab_detr import (
    encode_sinusoidal_position_embedding as theirs_sine,
)

from detr_nb import model as models
from detr_nb import transformer
from detr_nb.config import KINDS
from detr_nb.evaluation import batch_maker
from detr_nb.export import export_onnx
from detr_nb.family.references import (
    ReferenceHead,
    ReferenceQueries,
    RefiningHead,
    inverse_sigmoid,
    reference_sine,
)
from detr_nb.files import json_text
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.insight import attention_maps
from detr_nb.loading import DataConfig, MemoryDataset
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, DETRConfig, Head, TinyConfig
from detr_nb.notation import Memory, Target
from detr_nb.positions import SinePositions
from detr_nb.pretrained import pretrained_model
from detr_nb.training import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
TINY = {"backbone": TinyConfig((16, 16, 16), (4, 8, 8)), "hidden_dim": 16, "nheads": 2, "enc_layers": 1,
        "dec_layers": 2, "dim_feedforward": 16, "dropout": 0.0, "temperature": 20, "num_queries": 5}


def parts_of_the_page(names: set[str]) -> dict[str, str]:
    """The definitions of chapter 30 that are not exported, as text."""
    cells = json.loads((ROOT / "nbs" / "family" / "30_references.ipynb").read_text("utf8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    shown = [text for text in texts if not text.startswith(("#| export", "#| include", "#| default_exp"))]
    trees = [node for text in shown for node in ast.parse(text.replace("%", "#")).body]
    return {node.name: ast.unparse(node) for node in trees if getattr(node, "name", None) in names}


PAGE = parts_of_the_page({"PlacePosition", "PlacedDETR"})


@pytest.fixture(scope="module")
def placed() -> type[DETRConfig]:
    """The detector that chapter 30 builds, made of the chapter's own text."""
    space = {**vars(models), **vars(transformer), **globals()}
    for name in ("PlacePosition", "PlacedDETR"):
        exec(compile(PAGE[name], name, "exec"), space)
    yield space["PlacedDETR"]
    KINDS.pop("PlacedDETR", None)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def truth() -> list[Target]:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4]])
    return [Target(labels=torch.tensor([1, 2]), boxes=boxes), Target(labels=torch.tensor([0]), boxes=boxes[1:])]


def nothing() -> list[Target]:
    return [Target(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4)) for _ in range(2)]


# --- the logit of a share -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_the_logit_is_transformers_everywhere_and_torchs_inside(eps):
    share = torch.cat((drawn(1000), torch.tensor([-0.5, 0.0, 1e-7, eps, 1 - eps, 1.0, 1.5])))
    assert_close(inverse_sigmoid(share, eps), theirs_logit(share, eps), rtol=0, atol=0)
    inside = share[(share > eps) & (share < 1 - eps)]
    assert_close(inverse_sigmoid(inside, eps), torch.logit(inside))
    assert_close(inverse_sigmoid(inside, eps).sigmoid(), inside)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]), eps)
    assert_close(ends, math.log(eps) * torch.tensor([1.0, 1.0, -1.0, -1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_logit_is_finite_in_16_bits(dtype):
    shares = torch.tensor([0.0, 1e-6, 0.5, 1.0], dtype=dtype, requires_grad=True)
    found = inverse_sigmoid(shares)
    found.sum().backward()
    assert found.dtype == dtype and found.isfinite().all() and shares.grad.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 8), (3, 8, 4, -1), (3, 8, 4, 0, 5), (3, 8, 4, 0, -1)])
def test_references_that_cannot_be_are_named(sizes):
    with pytest.raises(ValueError, match="at least one place.*at most 4 fixed numbers; got"):
        ReferenceQueries(*sizes)


def test_heads_without_a_reference_or_with_a_wrong_eps_say_so():
    for eps in (0, -1, 0.5):
        with pytest.raises(ValueError, match=f"eps must be above 0 and below 0.5, got {eps}"):
            ReferenceHead(8, 3, eps)
    head, content = RefiningHead(8, 3), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="these queries have none"):
        head(0, content)


def test_the_gradient_of_the_logit_is_large_near_a_border_and_small_beyond_eps():
    for eps, share, slope in ((1e-5, 0.2, 6.25), (1e-5, 5e-4, 2001.0), (1e-3, 5e-4, 1.0005), (1e-3, 0.9995, 1.0005)):
        x = torch.tensor([share], dtype=torch.float64, requires_grad=True)
        inverse_sigmoid(x, eps).sum().backward()
        assert x.grad.item() == pytest.approx(slope, rel=1e-3), (eps, share)


# --- the sines ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("numbers", [2, 4])
def test_the_sines_are_those_of_transformers(numbers):
    ref = drawn(2, 7, numbers)
    assert_close(reference_sine(ref, 128), theirs_sine(ref, num_pos_feats=128), rtol=1e-5, atol=1e-5)


def test_a_reference_has_the_address_of_the_cell_that_ends_there():
    pad = torch.zeros(2, 5, 8, dtype=torch.bool)
    pad[1, 4:], pad[1, :, 6:] = True, True
    cells = SinePositions(64)(pad)
    for image, (rows, columns) in enumerate(((5, 8), (4, 6))):
        y, x = torch.meshgrid(torch.arange(rows) + 1, torch.arange(columns) + 1, indexing="ij")
        ref = torch.stack((x / columns, y / rows), -1).flatten(0, 1)[None]
        assert_close(reference_sine(ref, 32)[0], cells[image, :rows, :columns].flatten(0, 1), rtol=1e-4, atol=1e-4)
        swapped = reference_sine(ref.flip(-1), 32)[0]
        assert (swapped - cells[image, :rows, :columns].flatten(0, 1)).abs().max() > 0.5


# --- queries ------------------------------------------------------------------------------------------------------
def toy_memory(batch: int = 2, d: int = 8) -> Memory:
    rows = torch.zeros(batch, 6, d)
    return Memory(rows, rows, rows[..., 0] > 0, rows[..., :2], ((2, 3),), ())


@pytest.mark.parametrize("numbers", [2, 4])
def test_queries_stand_where_the_table_says_without_content(numbers):
    queries = ReferenceQueries(3, 8, numbers)
    asked = queries(toy_memory())
    assert asked.pos is None and asked.content.shape == (2, 3, 8) and not asked.content.any()
    for image in range(2):
        assert_close(asked.ref[image], queries.references.weight.sigmoid())
    assert queries.count == 3 and queries.class_maps() == []


def test_every_pattern_is_asked_at_every_place_pattern_by_pattern():
    queries = ReferenceQueries(3, 8, patterns=2)
    asked = queries(toy_memory())
    places = queries.references.weight.sigmoid()
    by_loops = [(queries.patterns.weight[p], places[n]) for p in range(2) for n in range(3)]
    for row, (content, ref) in enumerate(by_loops):
        assert_close(asked.content[1, row], content)
        assert_close(asked.ref[1, row], ref)


def test_more_queries_keep_the_old_places():
    queries = ReferenceQueries(3, 8, numbers=2, patterns=2)
    old, contents = queries.references.weight.clone(), queries.patterns.weight.clone()
    queries.resize(5, [2, 0])
    assert queries.count == 5
    assert_close(queries.references.weight[:2], old[[2, 0]], rtol=0, atol=0)
    assert_close(queries.patterns.weight, contents, rtol=0, atol=0)
    assert queries(toy_memory()).ref.shape == (2, 10, 2)


# --- heads --------------------------------------------------------------------------------------------------------
def test_a_fresh_head_says_the_reference_and_one_in_a_hundred():
    ref, content = drawn(2, 3, 4), drawn(2, 3, 8)
    head = ReferenceHead(8, 4)
    nn.init.zeros_(head.classes.weight)
    logits, boxes = head(0, content, ref)
    assert_close(boxes, ref)
    assert_close(logits.sigmoid(), torch.full((2, 3, 4), 0.01))
    assert_close(head(0, content, ref[..., :2]).boxes, torch.cat((ref[..., :2], torch.full((2, 3, 2), 0.5)), -1))


def nudged(head: ReferenceHead) -> ReferenceHead:
    """The head, with a last map that is not zero."""
    torch.manual_seed(1)
    nn.init.normal_(head.boxes[-1].weight)
    return head


def test_a_reference_in_the_middle_says_nothing():
    """Neutralised: with references of one half the head is DETR's."""
    head, plain, content = nudged(ReferenceHead(8, 4)), Head(8, 4), drawn(2, 3, 8)
    plain.load_state_dict(head.state_dict())
    for numbers in (2, 4):
        assert_close(head(0, content, torch.full((2, 3, numbers), 0.5)), plain(0, content), rtol=0, atol=0)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_boxes_are_counted_in_logits(eps):
    head, content, ref = nudged(ReferenceHead(8, 4, eps)), drawn(1, 3, 8), drawn(1, 3, 4)
    ref[0, 0, 0] = 1e-4
    start = torch.tensor([[math.log(max(s, eps) / max(1 - s, eps)) for s in row] for row in ref[0].tolist()])
    assert_close(head(0, content, ref).boxes[0], (head.boxes(content)[0] + start).sigmoid())
    assert head.refine(0, content, head(0, content, ref), ref)[0] is ref


def test_refining_moves_by_the_content_and_cuts_one_gradient_of_two():
    head, content = nudged(RefiningHead(8, 4)), drawn(1, 3, 8).requires_grad_()
    ref, base = head.refine(0, content, head(0, 2 * content, drawn(1, 3, 4)), drawn(1, 3, 4))
    assert_close(ref, base, rtol=0, atol=0)
    assert_close(base, head(0, content, drawn(1, 3, 4)).boxes)
    assert not ref.requires_grad and base.requires_grad


def test_looking_forward_twice_changes_gradients_and_no_value():
    """Two steps on one number: start .2, moved by a and by b, wanted .8; the gradient by hand."""

    class Offsets(nn.Module):
        def __init__(self, kind: type[ReferenceHead]):
            super().__init__()
            self.head, self.steps = kind(4, 2), nn.Parameter(torch.tensor([0.5, 1.0]))
            self.head.boxes = nn.Identity()

        def forward(self) -> Tensor:
            ref = base = torch.full((1, 1, 4), 0.2)
            for layer in range(2):
                content = self.steps[layer].expand(1, 1, 4)
                prediction = self.head(layer, content, base)
                ref, base = self.head.refine(layer, content, prediction, ref)
            return prediction.boxes[0, 0, 0]

    class Once(RefiningHead):
        def refine(self, *told: object) -> tuple[Tensor, Tensor]:
            ref, base = super().refine(*told)
            return ref, base.detach()

    values, slopes = [], []
    for kind in (RefiningHead, Once):
        number = Offsets(kind)
        box = number()
        (box - 0.8).square().backward()
        values.append(box.item())
        slopes.append(number.steps.grad.tolist())
    p = 1 / (1 + math.exp(-(math.log(0.2 / 0.8) + 0.5 + 1.0)))
    slope = 2 * (p - 0.8) * p * (1 - p)
    assert values == pytest.approx([p, p])
    assert slopes[0] == pytest.approx([slope, slope]) and slopes[1] == pytest.approx([0, slope])


# --- the record -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """results/why_slow.py, not run."""
    kind = KINDS.pop("PlacedDETR", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "results"))
        yield import_module("why_slow")
    sys.modules.pop("why_slow")
    KINDS.pop("PlacedDETR", None)
    KINDS.update({"PlacedDETR": kind} if kind else {})


def test_the_record_is_whole_and_made_as_the_program_says(program):
    record = json.loads((ROOT / "results" / "why_slow.json").read_text("utf8"))
    assert record["command"] == "python results/why_slow.py" and record["what"] == program.WHAT
    assert [row["name"] for row in record["rows"]] == list(program.RUNS)
    for row in record["rows"]:
        config = program.RUNS[row["name"]]
        assert row["config"] == json.loads(json_text(asdict(config)))
        assert row["name"] == f"{row['model']}, seed {row['seed']}" and row["seed"] == config.seed
        assert row["steps"] == program.STEPS and row["seconds"] > 60
        size = sum(p.numel() for p in config.model.build(3).parameters())
        assert row["parameters"] == size and row["metrics"] == {"AP": row["evaluations"][-1]["AP"]}


def test_every_moment_of_the_record_has_its_numbers(program):
    """Shares from 0 to 1; uniform attention is the same at all moments, and where every fresh model begins."""
    rows = json.loads((ROOT / "results" / "why_slow.json").read_text("utf8"))["rows"]
    uniform = rows[0]["evaluations"][0]["uniform"]
    for row in rows:
        assert [seen["step"] for seen in row["evaluations"]] == [150 * moment for moment in range(9)]
        for seen in row["evaluations"]:
            assert len(seen["inside"]) == 3 and all(0 < share < 1 for share in seen["inside"])
            assert 0 <= seen["AP"] <= 1 and seen["uniform"] == uniform
            assert (seen["changed"] is None) == (seen["step"] == 0) and 0 <= (seen["changed"] or 0) <= 1
        assert row["evaluations"][0]["inside"] == pytest.approx([uniform] * 3, abs=0.005)


def test_the_share_inside_is_that_of_a_loop_over_objects(program):
    """Two scenes of a fresh model, object by object, head by head."""
    model = build(DETRConfig)
    data = series(2, 3)
    matched = torch.arange(sum(len(data[i][1]["boxes"]) for i in range(2))) % 5
    inside, uniform = program.attention_inside(model, data, matched)
    shares, cells, queries = [], [], iter(matched.tolist())
    for i in range(2):
        batch = batch_maker(model)([data[0], data[1]])
        maps = attention_maps(model, roles=("cross",), **batch.inputs())
        for x, y, w, h in batch.targets[i]["boxes"].tolist():
            hit = [abs(u - x) < w / 2 and abs(v - y) < h / 2 for u, v in maps.xy[i].tolist()]
            looks = maps.cross[:, i, :, next(queries)].mean(1)  # i s
            shares.append(looks[:, torch.tensor(hit)].sum(1))
            cells.append(sum(hit) / len(hit))
    assert inside == pytest.approx(torch.stack(shares).mean(0).tolist(), abs=1e-4)
    assert uniform == pytest.approx(sum(cells) / len(cells), abs=1e-4)


# --- a detector made of the parts ---------------------------------------------------------------------------------
def test_the_record_was_made_with_the_detector_of_the_page():
    tree = ast.parse((ROOT / "results" / "why_slow.py").read_text("utf8"))
    recorded = {node.name: ast.unparse(node) for node in tree.body if getattr(node, "name", None) in PAGE}

    def bare(text: str) -> str:
        """Without docstrings, whose lines are cut at another column."""
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        return ast.unparse(tree)

    assert {name: bare(text) for name, text in PAGE.items()} == {name: bare(text) for name, text in recorded.items()}


def build(kind: type[DETRConfig], **changes: object) -> DETR:
    torch.manual_seed(0)
    model = kind(**{**TINY, **changes}).build(3)
    nudged(model.head)
    return model.eval()


def silent(model: DETR, targets: list[Target]) -> set[str]:
    """The parts that a loss teaches nothing."""
    criterion = criterion_for(model.train())
    total = criterion.total(criterion(model(pictures()), targets))
    total.backward()
    assert total.isfinite()
    return {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}


def test_gradients_reach_every_part_that_they_reach_in_detr_also_without_objects(placed):
    """What is silent in DETR (the first layer's content is zero) may be; without objects, what makes boxes too."""
    for targets, words in ((truth(), ()), (nothing(), ("queries", "boxes", "query_position"))):
        more = silent(build(placed), targets) - silent(build(DETRConfig), targets)
        assert all(any(word in name for word in words) for name in more), more


def test_queries_in_another_order_give_answers_in_that_order(placed):
    model, order = build(placed), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        before = model(pictures())
        model.queries.references.weight.copy_(model.queries.references.weight[order])
        after = model(pictures())
    assert_close(after.boxes, before.boxes[:, :, order], rtol=1e-4, atol=1e-5)
    assert_close(after.logits, before.logits[:, :, order], rtol=1e-4, atol=1e-5)


def test_new_classes_other_queries_and_what_they_look_at(placed):
    model = build(placed)
    replace_head(model, 4)
    resize_queries(model, 7)
    maps = attention_maps(model, pictures())
    assert maps.cross.shape == (2, 2, 2, 7, 8 * 12) and maps.out.logits.shape == (2, 2, 7, 5)
    assert model.config.num_queries == 7 and model.queries.count == 7


def test_a_run_of_two_steps_and_the_folder_it_leaves(placed, tmp_path):
    @dataclass(frozen=True)
    class Few(DataConfig):
        def load(self) -> tuple[MemoryDataset, MemoryDataset]:
            return series(8, 1), series(4, 2)

    run = fit(TrainConfig(Few(), placed(**TINY), steps=2, batch_size=4, evaluations=1, scales=(), progress=False))
    assert 0 <= run.metrics["AP"] <= 1
    run.model.eval().save_pretrained(tmp_path / "saved")
    again = pretrained_model(tmp_path / "saved")
    with torch.no_grad():
        assert_close(again(pictures())[:2], run.model(pictures())[:2])


@pytest.mark.slow
def test_it_is_exported_with_free_batch_and_size(placed, tmp_path):
    """The graph of ONNX is made of that of `export_program`."""
    model = build(placed)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "placed.onnx"))
    for images in (pictures(1), pictures(3, 96, 64)):
        pad = torch.zeros_like(images[:, 0], dtype=torch.bool)
        pad[0, 48:] = True
        with torch.no_grad():
            wanted = model(images, pad).layer(-1)
        found = session.run(None, {"images": images.numpy(), "pad": pad.numpy()})
        for ours, other in zip((wanted.logits[0], wanted.boxes[0]), found, strict=True):
            assert_close(torch.from_numpy(other), ours, rtol=1e-3, atol=1e-3)
