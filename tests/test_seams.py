"""The seams hold: two detectors that differ from DETR everywhere pass through everything that DETR passes through."""

import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from accelerate import Accelerator
from family import pictures
from members import Everything, Space, SpaceBoxes, inverse_sigmoid
from small_runs import SHARED, frozen_norms, gradients, series
from torch import Tensor, nn
from torch.testing import assert_close

from detr_nb.data import Batch
from detr_nb.evaluation import evaluate
from detr_nb.export import export_onnx, export_program
from detr_nb.finetuning import replace_head
from detr_nb.insight import attention_maps, capture_attention
from detr_nb.loading import DataConfig, MemoryDataset
from detr_nb.losses import SetCriterion, criterion_for
from detr_nb.model import DETR, Draws, RecordedDraws, SigmoidScores, TinyConfig
from detr_nb.notation import Output, Target
from detr_nb.pretrained import pretrained_model
from detr_nb.training import TrainConfig, fit, train_step

LIBRARY = Path(__file__).resolve().parents[1] / "detr_nb"
TINY = {"backbone": TinyConfig((16, 16, 16), (4, 8, 8)), "hidden_dim": 16, "nheads": 2, "enc_layers": 1,
        "dec_layers": 2, "dim_feedforward": 16, "dropout": 0.0, "temperature": 20}
EVERYTHING = Everything(num_queries=5, **TINY)


@dataclass(frozen=True)
class Pairs(DataConfig):
    """Scenes with two objects each."""

    def load(self) -> tuple[MemoryDataset, MemoryDataset]:
        """Scenes to learn from, and five others."""
        two = {"min_objects": 2, "max_objects": 2}
        return series(22, 1, **two), series(5, 2, **two)


def config(folder: Path | str = "", **changes: object) -> TrainConfig:
    """A short run of the first detector."""
    few = {"steps": 12, "batch_size": 4, "evaluations": 1, "log_every": 1, "scales": (), "progress": False}
    return TrainConfig(Pairs(), EVERYTHING, folder=str(folder), **{**few, **changes})


def truth() -> list[Target]:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4]])
    return [Target(labels=torch.tensor([1, 2]), boxes=boxes), Target(labels=torch.tensor([0]), boxes=boxes[1:])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was not interrupted."""
    return fit(config(tmp_path_factory.mktemp("whole") / "run"))


# --- training -----------------------------------------------------------------------------------------------------
def test_fit_trains_every_part_and_logs_it_by_name(run):
    row = run.history[-1]
    for part in ("", "_known", "_many"):
        assert {f"loss_ce{part}", f"loss_bbox{part}_0", f"loss_giou{part}"} <= row.keys()
    assert "loss_ce_proposals" in row and "loss_ce_proposals_0" not in row
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    torch.manual_seed(run.config.seed)
    fresh = dict(EVERYTHING.build(3).named_parameters())
    still = {name for name, now in run.model.named_parameters() if torch.equal(now, fresh[name])}
    assert not {name for name in still if not name.endswith(("k.bias",))}
    assert 0 <= run.metrics["AP"] <= 1


def test_a_stopped_run_ends_as_one_that_was_not_stopped(run, tmp_path):
    def stop(run) -> None:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        fit(config(tmp_path / "run"), watch=stop)
    again = fit(config(tmp_path / "run"))
    assert_close(again.model.state_dict(), run.model.state_dict(), rtol=0, atol=0)
    for ours, theirs in zip(again.history, run.history, strict=True):
        assert {**ours, "seconds": 0, "metrics": 0} == {**theirs, "seconds": 0, "metrics": 0}


def test_a_run_and_a_saved_folder_load_as_what_they_are(run, tmp_path):
    run.model.eval().save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        out = run.model(pictures())
        for source in (run.folder, tmp_path / "saved"):
            model = pretrained_model(source)
            assert model.config == EVERYTHING and model.scores == SigmoidScores(10)
            assert model.names == run.model.names
            assert_close(model.state_dict(), run.model.state_dict(), rtol=0, atol=0)
            assert_close(model(pictures())[:2], out[:2])


def test_new_classes_reach_the_head_the_proposals_and_the_labels(run):
    model = replace_head(pretrained_model(run.folder), 7, keep={4: 2})
    sizes = [len(table.weight) for table in model.class_maps()]
    assert sizes == [7, 7, 8] and model.num_classes == 7
    assert_close(model.decoder.head.classes.weight[4], run.model.decoder.head.classes.weight[2])
    assert_close(model.queries.labels.weight[[4, 7]], run.model.queries.labels.weight[[2, 3]])
    losses = criterion_for(model)(model.train()(pictures(), targets=truth()), truth())
    assert all(value.isfinite() for value in losses.values())


@dataclass(frozen=True)
class Tied(Everything):
    """The first detector with one class map for the head and for the proposals."""

    def decoder(self, columns: int, memory: nn.Module, queries: nn.Module) -> nn.Module:
        """Layers whose head borrows a map of the queries."""
        decoder = super().decoder(columns, memory, queries)
        decoder.head.classes = queries.propose.classes
        return decoder


def test_a_part_with_two_names_is_saved_once_and_stays_one(tmp_path):
    model = Tied(num_queries=5, **TINY).build(3).eval()
    model.save_pretrained(tmp_path)
    again = pretrained_model(tmp_path)
    assert again.decoder.head.classes.weight is again.queries.propose.classes.weight
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert [len(table.weight) for table in replace_head(again, 5).class_maps()] == [5, 5, 6]
    assert again.decoder.head.classes is again.queries.propose.classes


def test_the_criterion_refuses_a_part_that_it_does_not_know():
    model = EVERYTHING.build(3)
    one = [truth()[1]] * 2
    with pytest.raises(ValueError, match="known.*criterion_for"):
        SetCriterion(2)(model(pictures(), targets=one), one)
    softmax = SetCriterion(3)
    with pytest.raises(ValueError, match="divided by objects"):
        SetCriterion(3, extra={"known": softmax})


@dataclass(frozen=True)
class OwnMetric(Pairs):
    """Data that are not measured by boxes."""

    def evaluate(self, model: nn.Module, dataset: MemoryDataset, **options: object) -> dict[str, float]:
        """The number of held-out pictures, and whether the processes were said to share them."""
        return {"pictures": float(len(dataset)), "shared": float(options["shared"])}


def test_the_data_source_supplies_the_metric_that_a_run_reports():
    run = fit(replace(config(steps=2), data=OwnMetric()))
    assert run.metrics == {"pictures": 5, "shared": 1.0} and "AP" not in run.line()


def test_a_memory_says_how_much_of_its_grid_is_picture():
    """Pictures of 50 x 64 and 64 x 37 pixels in a frame of 64 x 64, with cells of 8 pixels."""
    pad = torch.zeros(2, 64, 64, dtype=torch.bool)
    pad[0, 50:], pad[1, :, 37:] = True, True
    memory = EVERYTHING.build(3).memory(pictures(2, 64, 64), pad, None)
    assert_close(memory.valid, torch.tensor([[[1.0, 7 / 8]], [[5 / 8, 1.0]]]))
    assert_close(memory.cells, torch.tensor([[[8.0, 50 / 8]], [[37 / 8, 8.0]]]))


# --- what training does to the answers ------------------------------------------------------------------------------
class Halves(Draws):
    """The middle of every range."""

    def uniform(self, name, shape, like):
        return torch.full(tuple(shape), 0.5).to(like)

    def integers(self, name, high, shape, like):
        return torch.full(tuple(shape), high // 2).to(like.device)


def test_groups_of_training_do_not_touch_the_answers():
    model = frozen_norms(EVERYTHING.build(3))
    pad = torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 40:] = True
    alone = model.eval()(pictures(), pad)
    assert list(alone.extra) == ["proposals"]
    together = model.train()(pictures(), pad, targets=truth())
    assert_close(together.logits, alone.logits, rtol=1e-4, atol=1e-5)
    assert_close(together.boxes, alone.boxes, rtol=1e-4, atol=1e-5)
    assert [part.logits.shape[2] for part in together.extra.values()] == [8 * 12, 4, 6]


def test_known_boxes_are_moved_as_the_recorded_numbers_say():
    model = EVERYTHING.build(3).train()
    (one,) = truth()[1:]
    model.queries.draws = RecordedDraws(labels=torch.tensor([2]), wrong=torch.tensor([0.1]),
                                        boxes=torch.tensor([[1.0, 0.5, 0.0, 0.75]]))
    memory = model.encoder(model.memory(pictures(1), torch.zeros(1, 64, 96, dtype=torch.bool), None))
    queries = model.queries(memory, [one])
    x, y, w, h = one["boxes"][0].tolist()
    moved = [x + 0.4 * w / 2, y, w - 0.4 * w, h + 0.2 * h]
    assert_close(queries.ref[0, :2], torch.tensor([moved, moved]))
    assert_close(queries.content[0, 0], model.queries.labels.weight[2])
    assert queries.groups[0].matches[0][1].tolist() == [0, 0] and queries.groups[0].repeats == 2
    with pytest.raises(ValueError, match="draw 'labels' has shape"):
        model.queries(memory, truth()[:1])


def test_known_matches_divide_by_objects_times_groups():
    model, targets = frozen_norms(EVERYTHING.build(3)).train(), truth()
    model.queries.draws = Halves()
    out = model(pictures(), targets=targets)
    losses = criterion_for(model)(out, targets)
    part = out.extra["known"]
    far = sum((part.boxes[-1, image][queries] - targets[image]["boxes"][objects]).abs().sum()
              for image, (queries, objects) in enumerate(part.matches))
    assert_close(losses["loss_bbox_known"], far / (3 * 2))


def test_a_batch_without_objects_trains_too():
    model = EVERYTHING.build(3).train()
    nothing = [Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))] * 2
    criterion = criterion_for(model)
    total = criterion.total(criterion(model(pictures(), targets=nothing), nothing))
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@dataclass(frozen=True)
class FixedEverything(Everything):
    """The first detector without batch norm and without chance, so that parts of a batch add up."""

    def build(self, num_classes: int) -> DETR:
        """Make it, freeze its norms and its draws."""
        model = frozen_norms(super().build(num_classes))
        model.queries.draws = Halves()
        return model


PARTS = replace(SHARED, data=Pairs(), model=FixedEverything(num_queries=5, **TINY))


def in_two_processes(folder: str) -> None:
    """What the test below starts in each of two processes."""
    torch.set_num_threads(1)
    found = {parts: gradients(PARTS, parts) for parts in (1, 2)}
    if Accelerator().is_main_process:
        torch.save(found, Path(folder) / "gradients.pt")


@pytest.mark.slow
def test_parts_and_processes_have_the_gradient_of_the_whole(tmp_path):
    code = f"import test_seams; test_seams.in_two_processes({str(tmp_path)!r})"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
               sys.executable, "-c", code]
    paths = os.pathsep.join([str(Path(__file__).parent), str(LIBRARY.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = gradients(PARTS, 1)
    shared = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for found in (*shared.values(), gradients(PARTS, 3)):
        size = float(alone["gradient"].abs().max())
        assert_close(found["gradient"], alone["gradient"], rtol=1e-4, atol=1e-5 * size)
    assert all(found["metrics"] == alone["metrics"] for found in shared.values())


# --- looking at it, handing it on -----------------------------------------------------------------------------------
def test_what_it_looks_at_is_drawn_as_for_detr(run):
    maps = attention_maps(run.model, pictures())
    assert maps.cross.shape == (2, 2, 2, 5, 96) and maps.queries.shape == (2, 2, 2, 5, 5)
    assert_close(maps.cross.sum(-1), torch.ones(2, 2, 2, 5))


@pytest.mark.slow
def test_it_is_exported_with_free_batch_and_size(run, tmp_path):
    model = run.model.eval()
    program = export_program(model).module()
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx"))
    for count, height, width in ((1, 64, 64), (3, 96, 160)):
        images = pictures(count, height, width)
        pad = torch.zeros(count, height, width, dtype=torch.bool)
        pad[0, height // 2 :] = True
        with torch.no_grad():
            out = model(images, pad)
        found = session.run(None, {"images": images.numpy(), "pad": pad.numpy()})
        for ours, graph, other in zip((out.logits[-1], out.boxes[-1]), program(images, pad), found, strict=True):
            assert_close(graph, ours, rtol=1e-4, atol=1e-4)
            assert_close(torch.from_numpy(other), ours, rtol=1e-3, atol=1e-3)


# --- scores ---------------------------------------------------------------------------------------------------------
class Fixed(nn.Module):
    """A detector that always gives the same answers: three queries, two classes, no column for no-object."""

    scores = SigmoidScores(top=4)

    def forward(self, images: Tensor, pad: Tensor) -> Output:
        logits = torch.tensor([[2.0, -3.0], [-3.0, 1.0], [-3.0, 3.0]])
        boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.1, 0.1, 0.1, 0.1]])
        return Output(logits[None, None].expand(1, len(images), 3, 2), boxes[None, None].expand(1, len(images), 3, 4))

    postprocess = DETR.postprocess
    boxes = None


class OneScene:
    """One picture with an object of each class."""

    names, category_ids = ["left", "right"], [1, 2]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
        target = Target(labels=torch.tensor([0, 1]), boxes=boxes, image_id=0, size=(40, 40))
        return torch.zeros(3, 40, 40, dtype=torch.uint8), target


def test_a_model_with_sigmoid_scores_gets_the_ap_computed_by_hand():
    """Class "left": the first answer is right, AP 1. Class "right", in the last column: the best answer is wrong, the
    second right, so precision is a half at every recall, and AP a half."""
    metrics = evaluate(Fixed(), OneScene())
    assert metrics["per_class"] == pytest.approx({"left": 1.0, "right": 0.5})
    assert metrics["AP"] == pytest.approx(0.75)


def test_sigmoid_scores_choose_over_queries_and_classes():
    logits = torch.tensor([[[4.0, 3.0, 9.0], [-1.0, 2.0, 9.0]]])
    chosen = SigmoidScores(top=3, spare=1).select(logits)
    assert chosen.queries.tolist() == [[0, 0, 1]] and chosen.labels.tolist() == [[0, 1, 1]]
    assert_close(chosen.scores, torch.tensor([[4.0, 3.0, 2.0]]).sigmoid())
    assert SigmoidScores(top=100).select(logits).scores.shape == (1, 6)
    assert SigmoidScores(spare=1).columns(91) == 92


# --- masks are a last part ------------------------------------------------------------------------------------------
class CopiedMasks(nn.Module):
    """The share of each query's content in the cells before the encoder: no good masks, but their arguments show."""

    def forward(self, out: Output, read, memory) -> Tensor:
        assert read.x is not memory.x and out.content is not None
        (grid,) = read.grids()
        return torch.einsum("bqd,bdyx->bqyx", out.content[-1], grid)


def test_masks_come_last_and_reach_the_detections():
    model = EVERYTHING.build(3).eval()
    model.masks = CopiedMasks()
    with torch.no_grad():
        out = model(pictures())
    assert out.masks.shape == (2, 5, 8, 12)
    found = model.postprocess(out, [(64, 96)] * 2)[0]
    chosen = model.scores.select(out.logits[-1]).queries[0]
    assert_close(found["masks"], out.masks[0, chosen])


# --- space ----------------------------------------------------------------------------------------------------------
def cameras(count: int = 2) -> Tensor:
    """Two cameras at the origin, one looking along x, one along y: metres to shares of the picture."""
    along_x = torch.tensor([[0.5, -0.5, 0, 0], [0.5, 0, -0.5, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]])
    along_y = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.5, -0.5, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])
    return torch.stack((along_x, along_y)).expand(count, 2, 4, 4)


def scenes() -> Batch:
    """Two scenes of two views; the second has no object, and padding in both views."""
    images = torch.randn(2, 2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    pad = torch.zeros(2, 2, 64, 96, dtype=torch.bool)
    pad[1, :, 40:] = True
    boxes = torch.tensor([[4.0, 1.0, 0.0, 1.0, 2.0, 1.5, 0.3, 1.0, 0.0],
                          [1.0, 5.0, 0.5, 1.0, 1.0, 2.0, -1.0, 0.0, 0.5]])
    targets = [Target(labels=torch.tensor([0, 1]), boxes=boxes),
               Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 9))]
    return Batch(images, pad, targets, cameras())


def space() -> DETR:
    torch.manual_seed(0)
    return frozen_norms(Space(num_queries=6, **TINY).build(2))


def test_a_detector_in_space_learns():
    model, batch = space().train(), scenes()
    criterion, optimizer = criterion_for(model), torch.optim.AdamW(model.parameters(), 3e-3)
    totals = [float(train_step(model, criterion, optimizer, batch, 1.0)["total"]) for _ in range(30)]
    assert totals[-1] < 0.7 * totals[0]
    assert all(p.grad is not None for p in model.parameters())


def test_its_losses_are_those_of_ten_numbers():
    model, batch = space(), scenes()
    out = model(**batch.inputs())
    losses = criterion_for(model)(out, batch.targets)
    assert "loss_giou" not in losses and out.boxes.shape == (2, 2, 6, 10)
    criterion = criterion_for(model)
    ((queries, objects), _) = criterion.matcher(out, batch.targets)[-1]
    by_hand = (out.boxes[-1, 0, queries] - SpaceBoxes().encode(batch.targets[0])[objects]).abs().sum() / 2
    assert_close(losses["loss_bbox"], by_hand)


def test_boxes_of_ten_numbers_come_back():
    target = scenes().targets[0]
    plain, keep = SpaceBoxes().decode(SpaceBoxes().encode(target), (1, 1))
    assert_close(plain, target["boxes"])
    assert keep.all() and not SpaceBoxes(reach=4.5).decode(SpaceBoxes().encode(target), (1, 1))[1][1]


def test_it_looks_where_its_points_are_projected():
    model, batch = space().eval(), scenes()
    with torch.no_grad(), capture_attention({"cross": model.attentions()["cross"]}) as seen:
        model(**batch.inputs())
    points, weights = seen["cross"][0]
    assert points.shape == (2, 6, 2, 1, 2) and weights.shape == (2, 6, 2, 1)
    metres = (model.queries.points.weight.sigmoid() - 0.5) * 20
    x, y, z = metres[0].tolist()
    if x > 0:
        assert_close(points[0, 0, 0, 0], torch.tensor([0.5 - 0.5 * y / x, 0.5 - 0.5 * z / x]))
    with pytest.raises(ValueError, match="points"):
        attention_maps(model, **batch.inputs())


def test_views_are_rows_of_one_memory():
    model, batch = space().eval(), scenes()
    with torch.no_grad():
        both = model.memory(batch.images, batch.pad, batch.cameras)
        first, second = (model.memory(batch.images[:, view], batch.pad[:, view], None) for view in (0, 1))
    assert_close(both.x, torch.cat((first.x, second.x), 1))
    assert_close(both.grids()[0].unflatten(0, (2, 2))[:, 1], second.grids()[0])
    spoilt = both._replace(x=torch.where(both.pad[..., None], 7.0, both.x))
    with torch.no_grad():
        assert_close(model.decoder(model.queries(spoilt), spoilt).boxes, model.decoder(model.queries(both), both).boxes)


def test_a_batch_of_scenes_can_be_cut_and_moved():
    batch = scenes()
    first, second = batch.split(2)
    assert_close(second.cameras, batch.cameras[1:])
    assert first.inputs().keys() == {"images", "pad", "cameras"} and len(first.targets) == 1
    assert batch.to("cpu").cameras is not None
    with pytest.raises(ValueError, match="4 x 4 matrix for each view"):
        space()(batch.images, batch.pad, cameras=batch.cameras[:, :1])


# --- nobody reaches in ------------------------------------------------------------------------------------------------
INSIDE = re.compile(r"\.decoder\.(layers|head|norm)\b|\.encoder\.layers\b|\.memory\.(backbone|positions|project)\b"
                    r"|\.queries\.embedding\b|\blogits\.shape\[-1\] - 1\b|softmax\(-1\)\[\.\.\., :-1\]")
AT_HOME = {"model", "transformer", "losses", "matcher"}


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("[a-z]*.py")), ids=lambda path: path.stem)
def test_nobody_reaches_into_the_anatomy_of_a_model(path):
    """Outside its own chapters a model is asked: backbone, blocks, attentions, head_outputs, class_maps, scores."""
    lines = [line.strip() for line in path.read_text("utf8").splitlines() if INSIDE.search(line)]
    assert path.stem in AT_HOME or not lines


def test_sampling_of_the_inverse_sigmoid_is_its_inverse():
    shares = torch.linspace(0.01, 0.99, 9)
    assert_close(inverse_sigmoid(shares).sigmoid(), shares)
    assert np.isfinite(inverse_sigmoid(torch.tensor([0.0, 1.0])).numpy()).all()
