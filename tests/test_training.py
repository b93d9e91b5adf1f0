"""Training against torch's own optimisers, and runs that are stopped, resumed, timed and refused."""

import inspect
import json
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close
from torchvision.transforms import v2

import detr_nb.loading as loading
import detr_nb.optimizer as optimizer
import detr_nb.runs as runs
import detr_nb.steps as steps
import detr_nb.training as chapter
from detr_nb.config import ConfigError, config_text
from detr_nb.data import Batch, Preprocess, pad_images
from detr_nb.loading import Augmented, DataConfig, MemoryLoader, ShapesData, batches
from detr_nb.losses import SetCriterion
from detr_nb.model import TinyModel, detr_resnet18, detr_tiny
from detr_nb.optimizer import Muon, matrices, optimizer_groups, orthogonalise
from detr_nb.runs import Callback, Checkpoint, Length, Log, Run, save_atomically
from detr_nb.shapes import EASY
from detr_nb.steps import accumulate_gradients, ready_to_train
from detr_nb.training import (
    Evaluation,
    Schedule,
    TrainConfig,
    build_criterion,
    create_run,
    fit,
    geometric_decay,
    loop,
    rate_factor,
    read_config,
    resize_batch,
    scale_at,
    train_step,
)

SMALL = TinyModel(num_queries=4, hidden_dim=16, nheads=2, dec_layers=2, dim_feedforward=16)
CONFIG = TrainConfig(ShapesData(EASY, train_images=24, val_images=4), SMALL, steps=6, batch_size=4, evaluations=1,
                     log_every=2, progress=False)


@dataclass(frozen=True)
class Cropped(DataConfig):
    """Scenes of which training sees random parts."""

    def load(self):
        """The same scenes; those held out are whole."""
        train, val = CONFIG.data.load()
        return Augmented(train, v2.RandomResizedCrop(96), Preprocess(size=(96, 96))), val


@pytest.fixture(scope="module")
def scenes():
    """Both series, drawn once."""
    return CONFIG.data.load()


@pytest.fixture(autouse=True)
def drawn_once(scenes, monkeypatch):
    """Every run of this file takes the scenes that are drawn."""
    monkeypatch.setattr(ShapesData, "load", lambda self: scenes)


def weights(model: nn.Module) -> torch.Tensor:
    """Every number of a model in one row, running statistics included."""
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


# --- Muon ---------------------------------------------------------------------------------------------------------
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99), size=st.floats(1e-4, 1e4))
@settings(max_examples=40, deadline=None)
def test_orthogonalising_keeps_the_singular_vectors_and_lifts_the_values(rows, columns, seed, size):
    x = size * torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ orthogonalise(x) @ vt.mT
    levelled = inside.diagonal(dim1=1, dim2=2)
    assert_close(inside, torch.diag_embed(levelled), atol=2e-3, rtol=0)
    clear = s > 0.02 * s.norm(dim=1, keepdim=True)
    assert levelled[clear].min() > 0.18 and levelled.max() < 2


def test_a_matrix_of_zeros_stays_zero():
    assert orthogonalise(torch.zeros(1, 3, 5)).abs().max() == 0


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_is_torchs_muon_with_the_same_polynomial(shape, monkeypatch):
    coefficients = (3.4445, -4.775, 2.0315)
    once = orthogonalise
    monkeypatch.setattr(optimizer, "orthogonalise", lambda x, dtype: once(x, torch.bfloat16, (coefficients,) * 5))
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(x) for x in [torch.randn(shape)] * 2)
    theirs = nn.Parameter(ours.detach().clone())
    a = Muon([{"params": [ours], "lr": 0.1, "orthogonal": True}], momentum=0.9)
    b = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0, ns_coefficients=coefficients, ns_steps=5,
                         adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(shape)
        before = ours.detach().clone()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
        assert (ours - before).norm() > 0.05
    assert_close(ours, theirs, atol=0.03, rtol=0)


def test_a_kernel_is_moved_as_the_matrix_of_its_rows():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    gradient = torch.randn(5, 3, 2, 2)
    kernel.grad, matrix.grad = gradient.to(memory_format=torch.channels_last), gradient.flatten(1)
    for p in (kernel, matrix):
        Muon([{"params": [p], "lr": 0.1, "orthogonal": True}]).step()
    assert_close(kernel.flatten(1), matrix)


@given(
    lr=st.floats(1e-5, 1e-1), decay=st.floats(0, 0.1), beta1=st.floats(0, 0.99), beta2=st.floats(0.5, 0.999),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_what_is_no_matrix_is_moved_as_by_torchs_adamw(lr, decay, beta1, beta2, seed):
    torch.manual_seed(seed)
    ours = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon([{"params": ours, "lr": lr, "orthogonal": False}], betas=(beta1, beta2), weight_decay=decay)
    b = torch.optim.AdamW(theirs, lr=lr, betas=(beta1, beta2), weight_decay=decay)
    for step in range(5):
        for p, q in zip(ours[: 2 + step % 2], theirs, strict=False):  # the last one has a gradient now and then
            p.grad = q.grad = torch.randn_like(p)
        a.step()
        b.step()
        a.zero_grad()
        b.zero_grad()
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lr_muon", [0, 5e-3])
@pytest.mark.parametrize("build", [detr_tiny, lambda: detr_resnet18(pretrained_backbone=False)])
def test_groups_hold_everything_that_learns_once(build, lr_muon):
    model = build()
    groups = optimizer_groups(model, 1e-3, 1e-4, lr_muon)
    found = [p for group in groups for p in group["params"]]
    learns = [p for p in model.parameters() if p.requires_grad]
    assert len(found) == len(learns) and set(found) == set(learns)
    moved = {p for group in groups if group["orthogonal"] for p in group["params"]}
    assert moved == ({p for p in matrices(model) if p.requires_grad} if lr_muon else set())
    assert all(p.ndim in (2, 4) for p in moved)
    head = model.decoder.head
    assert not moved & {model.queries.embedding.weight, head.classes.weight, head.boxes[-1].weight}
    for group in groups:
        highest = lr_muon if group["orthogonal"] else 1e-3
        assert group["lr"] == pytest.approx(highest / 10 if group["name"] == "backbone" else highest)


# --- pace ---------------------------------------------------------------------------------------------------------
@given(progress=st.floats(0, 1), warmup=st.floats(0.01, 0.5))
def test_the_rate_rises_and_falls_and_never_leaves_its_range(progress, warmup):
    assert 0 <= rate_factor(progress, warmup) <= 1
    later = min(progress + 0.01, 1)
    rising = rate_factor(later, warmup) >= rate_factor(progress, warmup)
    assert rising if later <= warmup else progress < warmup or not rising or later == progress


@given(progress=st.floats(0, 1), start=st.floats(0.1, 10), end=st.floats(0.1, 10))
def test_the_weight_moves_by_equal_factors(progress, start, end):
    middle = geometric_decay(progress / 2, start, end)
    assert middle**2 == pytest.approx(start * geometric_decay(progress, start, end))
    assert geometric_decay(1, start, end) == pytest.approx(end)


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="lr must be above 0"):
        optimizer_groups(detr_tiny(), 0, 0, 5e-3)


def test_the_schedule_reaches_rates_loss_and_pictures(scenes):
    run = create_run(replace(CONFIG, steps=4), scenes[0])
    criterion = build_criterion(run.config, run.model)
    run.step = 2
    Schedule(criterion, weights=(4, 1), scales=((0.4, 0.5), (0.8, 0.75))).before_step(run)
    assert criterion.last_layer_weights["loss_ce"] == pytest.approx(2) and run.scale == 0.75
    assert criterion.weights["loss_ce"] == criterion.weights["loss_ce_1"] == criterion.last_layer_weights["loss_ce"]
    assert all(g["lr"] == pytest.approx(g["highest_lr"] * 0.5 / 0.97) for g in run.optimizer.param_groups)


@given(scale=st.sampled_from([0.25, 0.5, 0.75, 1]), height=st.integers(8, 40), width=st.integers(8, 40))
@settings(deadline=None, max_examples=20)
def test_a_shrunk_batch_keeps_its_targets_and_pads_the_same_part(scale, height, width):
    images = [torch.rand(3, y, x) for y, x in ((height, width), (40, 40))]
    batch = Batch(*pad_images(images), [{}, {}])
    smaller = resize_batch(batch, scale)
    assert smaller.images.shape[-2:] == smaller.pad.shape[-2:] == (round(40 * scale), round(40 * scale))
    assert smaller.targets is batch.targets
    share = (~smaller.pad[0]).float().mean()
    assert share == pytest.approx(height * width / 1600, abs=2.5 / (40 * scale))
    flat = resize_batch(Batch(torch.full((1, 3, 40, 40), 0.3), batch.pad[:1], [{}]), scale)
    assert_close(flat.images, torch.full_like(flat.images, 0.3))


def test_pictures_grow_over_the_run():
    scales = ((0.25, 0.5), (0.6, 0.75))
    assert [scale_at(p, scales) for p in (0, 0.2, 0.25, 0.59, 0.6, 1)] == [0.5, 0.5, 0.75, 0.75, 1, 1]
    assert scale_at(0, ()) == 1


# --- the loop and its callbacks -----------------------------------------------------------------------------------
class Noted(Callback):
    """Writes down what it is called for."""

    def __init__(self, name: str, seen: list):
        self.name, self.seen = name, seen

    @contextmanager
    def around(self, run):
        self.seen.append(f"{self.name} opens")
        try:
            yield
        finally:
            self.seen.append(f"{self.name} closes")

    def before_step(self, run):
        self.seen.append(f"{self.name} before {run.step}")

    def after_step(self, run, losses):
        self.seen.append(f"{self.name} after {run.step}")


def toy_run(steps: int = 2, **changes: object) -> Run:
    """A run of a model that is none."""
    model = nn.Linear(1, 1)
    return Run(CONFIG, model, torch.optim.SGD(model.parameters()), None, length=Length(steps), **changes)


def test_callbacks_are_called_in_order_and_closed_however_the_loop_ends():
    seen = []
    two = [Noted("a", seen), Noted("b", seen)]
    loop(toy_run(1), lambda batch: seen.append(f"step on {batch}"), iter("xyz"), two)
    opened, closed = ["a opens", "b opens"], ["b closes", "a closes"]
    assert seen == [*opened, "a before 0", "b before 0", "step on x", "a after 1", "b after 1", *closed]
    seen.clear()
    with pytest.raises(ZeroDivisionError):
        loop(toy_run(), lambda batch: 1 / 0, iter("xyz"), two)
    assert seen == [*opened, "a before 0", "b before 0", *closed]


def test_a_run_that_is_told_to_stop_or_is_over_takes_no_step():
    over = toy_run()
    over.step = 2
    for run in (over, toy_run(stopping=True)):
        loop(run, pytest.fail, iter("x"), [])


@pytest.mark.parametrize("times", [0, 1, 3, 7])
def test_evaluations_are_evenly_spread_and_the_last_is_at_the_end(times, scenes, monkeypatch):
    run, log = toy_run(21), Log(every=10**6)
    monkeypatch.setattr(chapter, "evaluate_at", lambda *_: {"AP": float(run.step)})
    measured = Evaluation(scenes[1], times)
    loop(run, lambda batch: {"total": torch.ones(())}, iter(range(21)), [measured, log])
    assert [row["metrics"]["AP"] for row in run.history] == [21 * i // times for i in range(1, times + 1)]


def test_a_checkpoint_is_due_by_the_clock_at_the_end_and_when_told(monkeypatch):
    saved = []
    monkeypatch.setattr(runs, "save_run", lambda run: saved.append(run.step))
    run, checkpoint = toy_run(5, seconds=100.0), Checkpoint(every=10)
    with checkpoint.around(run):
        for seconds in (105, 110, 115, 119, 119):
            run.step, run.seconds = run.step + 1, float(seconds)
            checkpoint.after_step(run, None)
        assert saved == [2, 5]
        run.step, run.stopping = 3, True
        checkpoint.after_step(run, None)
    assert saved == [2, 5, 3]


def test_nothing_but_fit_and_what_writes_it_down_reads_the_configuration():
    for module in (runs, steps):
        found = re.findall(r"\bconfig\.(\w+)", Path(module.__file__).read_text())
        assert set(found) <= {"flat", "yaml", "seed"}  # as a whole, the name of the file, and `describe_run`
    source = inspect.getsource(loop) + inspect.getsource(Schedule) + inspect.getsource(Evaluation)
    assert "config" not in source


# --- steps --------------------------------------------------------------------------------------------------------
def test_bfloat16_leaves_losses_and_weights_in_float32_and_near(scenes):
    batch = next(MemoryLoader(scenes[0], 4, 0).epoch(0))
    rows = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = SMALL.build(3)
        optimizer = Muon(optimizer_groups(model, 1e-3, 1e-3, 1e-3), dtype=torch.bfloat16 if bf16 else torch.float32)
        rows.append(train_step(model, SetCriterion(3), optimizer, batch, 0.1, bf16))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert rows[0].keys() == rows[1].keys()
    for name in ("loss_ce", "loss_bbox", "loss_giou", "total"):
        assert rows[1][name].dtype == torch.float32 and not rows[1][name].requires_grad
        assert_close(rows[0][name], rows[1][name], rtol=0.03, atol=0.03)
        assert rows[0][name] != rows[1][name]


# --- runs that stop -----------------------------------------------------------------------------------------------
@pytest.fixture
def fit_until(monkeypatch):
    """A run whose data end with an error after some steps."""
    def ends(stream, after):
        yield from islice(stream, after)
        raise ConnectionError("the plug was pulled")

    def run(config: TrainConfig, after: int) -> None:
        with monkeypatch.context() as patch, pytest.raises(ConnectionError):
            patch.setattr(chapter, "batches", lambda *args: ends(batches(*args), after))
            fit(config)

    return run


SEVERAL = [pytest.param(stops, CONFIG.data, marks=pytest.mark.slow) for stops in ((5,), (2, 3), (0, 1, 1))]


@pytest.mark.parametrize(("stops", "data"), [((5,), Cropped()), *SEVERAL])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(stops, data, tmp_path, fit_until):
    whole = fit(replace(CONFIG, data=data))
    config = replace(whole.config, folder=str(tmp_path / "run"), save_every=0)
    for after in stops:
        fit_until(config, after)
    resumed = fit(config)
    assert resumed.step == whole.step == 6
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert repr(resumed.metrics) == repr(whole.metrics)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    logged, expected = (
        [{name: value for name, value in row.items() if name not in ("seconds", "metrics")} for row in rows]
        for rows in (map(json.loads, lines), whole.history)
    )
    assert logged == expected and len(logged) == 3


def test_training_images_pass_their_transform_and_the_model_keeps_the_rule():
    run = fit(replace(CONFIG, data=Cropped(), steps=1))
    assert run.model.preprocess == Preprocess(size=(96, 96))
    sizes = {batch.images.shape[2:] for batch in Cropped().load()[0].loader(4, 0).epoch(0)}
    assert sizes == {(96, 96)}


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(tmp_path):
    config = replace(CONFIG, folder=str(tmp_path))
    first = fit(config)
    again = fit(config)
    assert again.seconds == first.seconds and repr(again.metrics) == repr(first.metrics)
    assert torch.equal(weights(first.model), weights(again.model))


@pytest.mark.slow
def test_other_seeds_are_other_runs():
    assert not torch.equal(weights(fit(CONFIG).model), weights(fit(replace(CONFIG, seed=1)).model))


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    config = replace(CONFIG, folder=str(tmp_path))
    fit(config)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt belongs to another .*:\n  lr: there 0.0015, here 1e"):
        fit(replace(config, lr=1e-5))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_atomically({"step": 1}, path)

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


# --- the clock ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_evaluation_is_not_on_the_clock(monkeypatch):
    def slow(model, dataset, **_):
        time.sleep(0.5)
        return {"AP": 0.0, "AP50": 0.0}

    monkeypatch.setattr(loading, "evaluate", slow)
    begun = time.perf_counter()
    run = fit(replace(CONFIG, evaluations=3))
    assert sum("metrics" in row for row in run.history) == 3
    assert run.seconds <= time.perf_counter() - begun - 1.5


@pytest.mark.slow
def test_a_run_of_minutes_ends_when_they_are_over():
    run = fit(replace(CONFIG, minutes=0.02, evaluations=1))
    assert run.seconds >= 1.2 and run.step >= 1 and run.progress == 1
    assert run.history[-1]["step"] == run.step and "AP" in run.metrics


# --- a run on paper -----------------------------------------------------------------------------------------------
def test_a_configuration_is_a_file_and_flags_alike(tmp_path):
    config = replace(CONFIG, minutes=0.5, scales=((0.5, 0.5),), drops=(0.6, 0.9), trackers=("tensorboard",), ema=0.99)
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert read_config(["--config", str(tmp_path / "config.yaml")]) == config
    flags = ["--data", "ShapesData", "--data.train_images", "24", "--lr", "0.1", "--bf16", "true"]
    asked = read_config(["--config", str(tmp_path / "config.yaml"), *flags])
    assert asked == replace(config, data=ShapesData(EASY, 24, 4), lr=0.1, bf16=True)
    assert read_config([]) == TrainConfig()


@pytest.mark.parametrize(("words", "reason"), [
    (["--stps", "3"], "stps"), (["--steps", "many"], "many"), (["--data", "Nowhere"], "Nowhere"),
    (["--config", "missing.yaml"], "missing.yaml"),
])
def test_a_wrong_flag_is_named(words, reason):
    with pytest.raises(ConfigError, match=reason):
        read_config(words)


@pytest.mark.slow
def test_how_a_run_is_carried_out_may_change_when_it_goes_on(tmp_path, fit_until):
    config = replace(CONFIG, folder=str(tmp_path / "first"), save_every=0)
    fit_until(config, after=3)
    (tmp_path / "first").rename(tmp_path / "second")
    moved = replace(config, folder=str(tmp_path / "second"), save_every=60, log_every=3)
    assert torch.equal(weights(fit(moved).model), weights(fit(CONFIG).model))


@pytest.mark.slow
def test_dropout_and_the_running_average_survive_a_stop(tmp_path, fit_until):
    config = replace(CONFIG, model=replace(SMALL, dropout=0.3), ema=0.7)
    whole = fit(config)
    kept = replace(config, folder=str(tmp_path), save_every=0)
    fit_until(kept, after=3)
    resumed = fit(kept)
    assert torch.equal(weights(resumed.model), weights(whole.model)) and resumed.metrics.keys() == whole.metrics.keys()
    assert not torch.equal(weights(whole.model), weights(fit(replace(config, ema=0)).model))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"recompute": True}, {"accumulate": 3}])
def test_memory_is_traded_without_changing_the_run(how):
    """Without batch norm, whose means are those of the part that it sees."""
    config = replace(CONFIG, data=CONFIG.data, model=TinyModel(dropout=0.0, hidden_dim=16, nheads=2), steps=2)
    runs = [create_run(replace(config, **more), CONFIG.data.load()[0]) for more in ({}, how)]
    batch = next(MemoryLoader(CONFIG.data.load()[0], 4, 0).epoch(0))
    gradients = []
    for run in runs:
        criterion = build_criterion(run.config, run.model)
        with ready_to_train(run.model, run.accelerator, run.config.recompute) as model:
            run.model.memory.backbone.eval()
            accumulate_gradients(model, criterion, batch.split(run.config.accumulate), run.accelerator)
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))


@pytest.mark.slow
def test_who_watches_sees_every_row_and_epochs_end_the_run():
    seen = []
    run = fit(replace(CONFIG, epochs=1.5), watch=lambda run: seen.append(run.step))
    assert run.step == 9 and seen == [row["step"] for row in run.history] == [2, 4, 6, 8, 9]


def test_a_tracker_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="trackers: 'no_such_tracker' is not installed or not known"):
        fit(replace(CONFIG, trackers=("no_such_tracker",)))


@pytest.mark.slow
def test_tensorboard_gets_what_the_log_gets(tmp_path):
    run = fit(replace(CONFIG, trackers=("tensorboard",), folder=str(tmp_path)))
    seen = EventAccumulator(str(tmp_path / "detr_nb")).Reload()
    assert {"total", "AP", "AP/circle", "grad_norm"} <= set(seen.Tags()["scalars"])
    assert [(event.step, pytest.approx(event.value)) for event in seen.Scalars("total")] == [
        (row["step"], row["total"]) for row in run.history]
