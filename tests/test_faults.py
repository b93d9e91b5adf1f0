"""Runs that are killed, told to end, starved of disk, or fed with what nobody can learn from."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import small_runs
import torch
from small_runs import CONFIG, Deadly, Drawn, series, wait_for

import detr_nb.runs as runs
import detr_nb.training as training
from detr_nb.checks import DataError
from detr_nb.formats import CocoData, CocoDataset, Sizes, write_coco
from detr_nb.loading import Augmented, MemoryDataset, batches
from detr_nb.matcher import NotFinite
from detr_nb.runs import Terminated, save_atomically
from detr_nb.shapes import EASY, Scenes
from detr_nb.steps import checked_step
from detr_nb.training import build_criterion, check_before, create_run, fit

SHORT = replace(CONFIG, steps=6, evaluations=1, log_every=2, ema=0)
LATE = replace(SHORT, save_every=60)  # saves at its end, or when something ends it


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have the library loaded, each with a memory of its own."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["small_runs"])

    def begin(function, *args):
        process = context.Process(target=function, args=args)
        process.start()
        return process

    return begin


def finish(process) -> int:
    """The exit code of a process that ends by itself."""
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def state_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a: object, b: object) -> bool:
    """Equal to the last bit, whatever they are made of."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)


def assert_same_end(folder: Path, other: Path) -> None:
    """Both runs ended with the same weights, moments, averages and log; only their clocks differ."""
    states = [state_of(place) for place in (folder, other)]
    for state in states:
        del state["seconds"], state["parts"], state["config"]
        for row in state["history"]:
            del row["seconds"]
    assert same(*states)
    logs = [[json.loads(line)["total"] for line in (place / "log.jsonl").read_text().splitlines()]
            for place in (folder, other)]
    assert logs[0] == logs[1] and len(logs[0]) == len(states[0]["history"])


@pytest.fixture(scope="module")
def unbroken(processes, tmp_path_factory) -> tuple[Path, float]:
    """A run that nothing befell, and the seconds that it took."""
    folder, begun = tmp_path_factory.mktemp("unbroken"), time.monotonic()
    assert finish(processes(small_runs.train, str(folder))) == 0
    return folder, time.monotonic() - begun


# --- killed -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_bit_for_bit_like_one_that_was_not(processes, unbroken, tmp_path):
    whole, seconds = unbroken
    chance, hits = random.Random(0), 0
    for _ in range(20):
        process = processes(small_runs.train, str(tmp_path))
        if chance.random() < 0.8:  # the others may die while they start
            wait_for(tmp_path / "checkpoint.pt")
        time.sleep(chance.uniform(0, 0.15 * seconds))
        if process.is_alive():
            hits += 1
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert hits >= 10, "the run was over too early to be killed"
    assert finish(processes(small_runs.train, str(tmp_path))) == 0
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_143(processes, unbroken, tmp_path):
    process = processes(small_runs.train, str(tmp_path))
    wait_for(tmp_path / "checkpoint.pt")
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    saved = state_of(tmp_path)["step"]
    assert 0 < saved < CONFIG.steps
    assert finish(processes(small_runs.train, str(tmp_path))) == 0
    assert_same_end(tmp_path, unbroken[0])


# --- no room, no place, no sense ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(processes, tmp_path):
    process = processes(small_runs.train, str(tmp_path))
    wait_for(tmp_path / "checkpoint.pt")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert len(before) > 100_000
    assert finish(processes(small_runs.train_with_little_disk, str(tmp_path))) == 5
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_file_where_the_folder_belongs_is_said_before_the_first_step(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken cannot be written to .*give another one"):
        fit(replace(SHORT, folder=str(tmp_path / "taken")))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello" * 99])
def test_a_damaged_checkpoint_is_named_and_left(damage, tmp_path):
    save_atomically({"config": "", "epoch_steps": 1}, tmp_path / "checkpoint.pt")
    damaged = damage((tmp_path / "checkpoint.pt").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"checkpoint\.pt \(\d+ bytes\) cannot be read .*delete it to start anew"):
        fit(replace(SHORT, folder=str(tmp_path)))
    assert (tmp_path / "checkpoint.pt").read_bytes() == damaged


@pytest.mark.slow
def test_a_checkpoint_of_another_model_or_of_other_data_names_what_differs(tmp_path):
    config = replace(SHORT, folder=str(tmp_path))
    fit(config)
    with pytest.raises(ValueError, match=r"model\.hidden_dim: there 16, here 32"):
        fit(replace(config, model=replace(SHORT.model, hidden_dim=32)))
    with pytest.raises(ValueError, match=r"data\.count: there 22, here 30"):
        fit(replace(config, data=Drawn(30)))


# --- numbers that are none ----------------------------------------------------------------------------------------
def poisoned(stream, when: set[int], kind: float):
    """The same batches, with one bad pixel in the second image of some."""
    for number, batch in enumerate(stream):
        if number in when:
            batch.images[1, 2, 3, 4] = kind
        yield batch


@pytest.fixture
def fit_poisoned(monkeypatch):
    """A run that meets bad batches."""
    def run(config, when, kind=float("nan")):
        with monkeypatch.context() as patch:
            patch.setattr(training, "batches", lambda *args: poisoned(batches(*args), when, kind))
            return fit(config)

    return run


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_a_bad_pixel_stops_the_run_before_the_weights_and_names_the_images(kind, tmp_path, fit_poisoned):
    config = replace(SHORT, folder=str(tmp_path), save_every=0)
    ids = [int(t["image_id"]) for t in next(iter(config.data.load()[0].loader(4, 0).epoch(0, start=3))).targets]
    said = rf"step 3: the first tensor that is not finite: images\. The batch: {', '.join(f'image {i}' for i in ids)}\."
    with pytest.raises(NotFinite, match=said):
        fit_poisoned(config, {3}, kind)
    state = state_of(tmp_path)
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())
    assert fit(config).step == 6  # the same run, without the poison, goes on


def test_bad_batches_are_skipped_as_often_as_was_allowed(capsys, fit_poisoned):
    run = fit_poisoned(replace(SHORT, skip_not_finite=2), {1, 4})
    assert (run.step, run.skipped) == (6, 2) and "skipped (2 of at most 2): step 4" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    with pytest.raises(NotFinite, match="set skip_not_finite; it is 2"):
        fit_poisoned(replace(SHORT, skip_not_finite=2), {1, 2, 4})


def test_a_gradient_that_overflows_is_named_by_its_parameter():
    run = create_run(SHORT, SHORT.data.load()[0])
    run.model.queries.embedding.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    batch = next(SHORT.data.load()[0].loader(4, 0).epoch(0))
    with pytest.raises(NotFinite, match=r"gradient of queries\.embedding\.weight"):
        checked_step(run, run.model, build_criterion(SHORT, run.model), [batch], SHORT.clip)
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in before.items())


# --- data that cannot be learned from -----------------------------------------------------------------------------
@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_an_error():
    """The news is a signal: it may come while the type checker of the tests looks at a value, and be its cause then."""
    with pytest.raises(Exception) as caught:  # noqa: B017 - the chain is looked at below
        fit(replace(SHORT, data=Deadly()))
    chain = [caught.value]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    found = [str(error) for error in chain if isinstance(error, RuntimeError)]
    assert any(re.search("DataLoader worker .*exited unexpectedly", text) for text in found)


@pytest.fixture
def coco(tmp_path) -> CocoData:
    """Twelve drawn pictures in a folder, in COCO's format."""
    for name, seed in (("train", 1), ("val", 2)):
        write_coco(Scenes(replace(EASY, size=64), 12, seed), tmp_path / name)
    places = [tmp_path / name / part for name in ("train", "val") for part in ("images", "annotations.json")]
    return CocoData(*places, sizes=Sizes((64,), 64, (), eval_side=64), workers=0)


def change(file: Path, how) -> None:
    """Rewrite a JSON file."""
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_run(coco):
    runs = [fit(replace(SHORT, data=replace(coco, workers=workers), steps=3)) for workers in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*(run.model.state_dict().values() for run in runs), strict=True))


def test_a_picture_that_is_missing_is_said_at_the_start(coco):
    lost = sorted(coco.train.iterdir())[3]
    lost.unlink()
    with pytest.raises(DataError, match=f"{lost.name}: picture is missing"):
        fit(replace(SHORT, data=coco))
    with pytest.warns(UserWarning, match="1 of 12 images are skipped"):
        train, _ = replace(coco, skip_unreadable=True).load()
    assert len(train) == 11


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_picture_that_is_cut_short_is_named_when_it_is_read(coco, workers):
    cut = sorted(coco.train.iterdir())[3]
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(DataError, match=cut.name):
        fit(replace(SHORT, data=replace(coco, workers=workers)))


def test_a_class_that_is_not_in_the_list_is_said_at_the_start(coco):
    change(coco.train_file, lambda content: content["annotations"][2].update(category_id=77))
    with pytest.raises(DataError, match=r"annotations\[2\].*77"):
        fit(replace(SHORT, data=coco))


def test_held_out_data_with_other_classes_are_refused(coco):
    change(coco.val_file, lambda content: content["categories"][0].update(name="zebra"))
    with pytest.raises(ValueError, match="held-out data: its classes are .*zebra"):
        fit(replace(SHORT, data=coco))


def test_an_empty_list_is_refused(coco):
    change(coco.val_file, lambda content: content.update(images=[], annotations=[]))
    with pytest.raises(ValueError, match="held-out data: there are 0 images"):
        fit(replace(SHORT, data=coco))


def test_a_label_in_memory_that_is_out_of_range_is_said_at_the_start():
    good = series(3, 1)
    wrong = {**good.targets[1], "labels": good.targets[1]["labels"] + 9}
    data = MemoryDataset(good.images, [good.targets[0], wrong, good.targets[2]], good.names)
    with pytest.raises(ValueError, match="training data: image 1: label .* is outside 0..2"):
        check_before(data, good.names, "training data")


def test_what_lies_under_a_transform_is_checked(coco):
    data = CocoDataset(coco.train, coco.train_file)
    data.items[4]["file_name"] = "nowhere.png"
    with pytest.raises(DataError, match="nowhere.png"):
        check_before(Augmented(data, None), data.names, "training data")


# --- folders ------------------------------------------------------------------------------------------------------
def words_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.fault("--folder of another project with config.yaml and log.jsonl")
@pytest.mark.parametrize(("files", "named"), [
    ({"config.yaml": "site_name: pages\n", "log.jsonl": '{"level": "info"}\n'}, "config.yaml"),
    ({"config.yaml": "- a list\n"}, "config.yaml"), ({"config.yaml": "\xff"}, "config.yaml"),
    ({"log.jsonl": '{"level": "info"}\n'}, "log.jsonl"), ({"log.jsonl": "started\n"}, "log.jsonl"),
    ({"model.safetensors": "", "config.json": "{}"}, "model.safetensors"),
])
def test_a_folder_of_something_else_is_refused_and_left(files, named, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text, "latin1")
    before = words_in(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){named}.*Give another folder"):
        fit(replace(SHORT, folder=str(tmp_path)))
    assert words_in(tmp_path) == before


@pytest.mark.fault("checkpoint.tmp is a folder")
@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "checkpoint.pt"])
def test_a_folder_in_place_of_a_file_is_said_before_the_first_step(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is a folder"):
        fit(replace(SHORT, folder=str(tmp_path)), watch=pytest.fail)


@pytest.mark.fault("checkpoint.tmp is a folder")
def test_other_names_in_the_folder_are_no_obstacle(tmp_path):
    (tmp_path / "checkpoint.tmp").mkdir()
    fit(replace(SHORT, folder=str(tmp_path)))
    assert state_of(tmp_path)["step"] == 6
    kept = {"checkpoint.pt", "checkpoint.tmp", "config.yaml", "log.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def steps_in_log(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.fault("three at once, checkpoint read all the time")
@pytest.mark.fault("two at once, --save_every 3")
@pytest.mark.fault("the same command twice on one folder, --save_every 0")
def test_a_folder_is_held_by_one_run_and_its_checkpoint_can_be_read_at_every_moment(processes, tmp_path):
    first = processes(small_runs.train_and_save_each_step, str(tmp_path))
    wait_for(tmp_path / "checkpoint.pt")
    with pytest.raises(RuntimeError, match=f"in use as a run's folder by process {first.pid}"):
        fit(replace(CONFIG, folder=str(tmp_path)))
    seen = set()
    while first.is_alive():
        seen.add(state_of(tmp_path)["step"])
    assert finish(first) == 0 and len(seen) > 3
    assert steps_in_log(tmp_path) == sorted(set(steps_in_log(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "config.yaml", "log.jsonl"}


@pytest.mark.fault("folder deleted in mid-run")
def test_a_folder_that_is_deleted_is_made_whole_again_and_said(tmp_path, capsys):
    def delete(run):
        if run.step == 4:
            shutil.rmtree(run.folder)

    fit(replace(SHORT, folder=str(tmp_path / "run")), watch=delete)
    assert "was deleted while the run wrote there" in capsys.readouterr().err
    assert {"checkpoint.pt", "config.yaml", "log.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert steps_in_log(tmp_path / "run") == [2, 4, 6]


# --- whatever ends it ---------------------------------------------------------------------------------------------
def ended(config, error, watch=None, match=None) -> None:
    with pytest.raises(error, match=match):
        fit(config, watch)


def assert_goes_on_as_if_nothing_had_happened(config, saved: int) -> None:
    """The state that an error left is that of `saved` steps, and the run ends like one without an error."""
    assert state_of(Path(config.folder))["step"] == saved
    whole, resumed = fit(replace(config, folder="")), fit(config)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    rows = [[{**row, "seconds": 0} for row in run.history] for run in (whole, resumed)]
    assert repr(rows[0]) == repr(rows[1]) and steps_in_log(Path(config.folder)) == [row["step"] for row in rows[0]]


@pytest.mark.fault("a picture vanishes in mid-run (save_every 60)")
def test_a_picture_that_vanishes_is_named_and_the_steps_so_far_are_saved(coco, tmp_path, capsys):
    config = replace(LATE, data=coco, folder=str(tmp_path / "run"))
    away = tmp_path / "away"

    def vanish(run):
        if run.step == 2:
            coco.train.rename(away)

    ended(config, DataError, vanish, "picture is FileNotFoundError")
    assert "the 2 steps so far are saved in" in capsys.readouterr().err
    away.rename(coco.train)
    assert_goes_on_as_if_nothing_had_happened(config, 2)


@pytest.mark.fault("disk full for log.jsonl")
def test_a_full_log_is_named_and_the_steps_so_far_are_saved(tmp_path):
    config = replace(LATE, folder=str(tmp_path))

    def fill(run):
        if run.step == 2:
            (tmp_path / "log.jsonl").unlink()
            (tmp_path / "log.jsonl").symlink_to("/dev/full")

    ended(config, OSError, fill, r"log\.jsonl could not be written .*No space left")
    ended(config, ValueError, None, r"log\.jsonl is a folder or a device")
    (tmp_path / "log.jsonl").unlink()
    assert_goes_on_as_if_nothing_had_happened(config, 4)


def test_an_error_of_who_watches_saves_too(tmp_path):
    config = replace(LATE, folder=str(tmp_path))
    ended(config, ZeroDivisionError, lambda run: 1 / (run.step - 4))
    assert_goes_on_as_if_nothing_had_happened(config, 4)


def test_half_a_step_is_not_saved(tmp_path, monkeypatch, capsys):
    config = replace(LATE, folder=str(tmp_path))
    step, calls = training.Muon.step, []

    def broken(self, *args):
        calls.append(1)
        step(self, *args)
        if len(calls) == 3:
            raise MemoryError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(training.Muon, "step", broken)
        ended(config, MemoryError)
    assert "while step 2 changed the weights: nothing was saved" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


@dataclass(frozen=True)
class SlowToMeasure(Drawn):
    """Scenes whose evaluation takes half a minute, as long as a file says so."""

    slow: str = ""

    def evaluate(self, model, dataset, **options):
        end = time.monotonic() + (30 if Path(self.slow).exists() else 0)
        while time.monotonic() < end:
            model.training  # noqa: B018 - works, but not for long in one piece
        return super().evaluate(model, dataset, **options)


@pytest.mark.fault("SIGTERM during an evaluation of 4000 images")
@pytest.mark.fault("the same, default model, 128 px")
@pytest.mark.parametrize(("number", "ends", "last"), [
    (signal.SIGTERM, SystemExit, 3), (signal.SIGINT, KeyboardInterrupt, 6)])
def test_a_signal_cuts_an_evaluation_which_is_made_when_the_run_goes_on(number, ends, last, tmp_path):
    slow = tmp_path / "slow"
    data = SlowToMeasure(slow=str(slow))
    config = replace(LATE, data=data, evaluations=2 if last == 3 else 1, folder=str(tmp_path / "run"))
    slow.touch()
    timer = threading.Timer(0, lambda: None)

    def tell_soon(model):
        nonlocal timer
        timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
        timer.start()

    begun = time.monotonic()
    Timed.begin = tell_soon
    with pytest.raises(ends) as left:
        fit(replace(config, data=Timed(slow=str(slow))))
    assert time.monotonic() - begun < 15
    assert number == signal.SIGINT or left.value.code == 143
    slow.unlink()
    assert_goes_on_as_if_nothing_had_happened(replace(config, data=Timed(slow=str(slow))), last)


@dataclass(frozen=True)
class Timed(SlowToMeasure):
    """Tells when the evaluation begins."""

    def evaluate(self, model, dataset, **options):
        if Path(self.slow).exists():
            Timed.begin(model)
        return super().evaluate(model, dataset, **options)


@dataclass(frozen=True)
class Many(Drawn):
    """So many held-out scenes that the model looks at them for a while."""

    def load(self) -> tuple[MemoryDataset, MemoryDataset]:
        """A few scenes to learn from, and 6000 to be examined with."""
        few = series(100, 2)
        targets = [{**few.targets[i % 100], "image_id": i} for i in range(6000)]
        many = MemoryDataset(few.images.repeat(60, 1, 1, 1), targets, few.names, few.category_ids)
        return series(self.count, 1), many

    def evaluate(self, model, dataset, **options):
        """Send the signal half a second later."""
        threading.Timer(0.5, lambda: (told.append(time.monotonic()), os.kill(os.getpid(), signal.SIGTERM))).start()
        found = super().evaluate(model, dataset, **options)
        told.append(None)
        return found


told: list[float | None] = []


@pytest.mark.slow
@pytest.mark.fault("SIGTERM during an evaluation of 4000 images")
def test_sigterm_ends_a_real_evaluation_of_thousands_of_images_within_seconds(tmp_path):
    told.clear()
    with pytest.raises(SystemExit) as left:
        fit(replace(SHORT, data=Many(), steps=2, folder=str(tmp_path)))
    assert left.value.code == 143 and None not in told, "the evaluation was over before the signal came"
    assert time.monotonic() - told[0] < 10  # five seconds on a machine twice as fast
    assert state_of(tmp_path)["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("whom", "code"), [("group", 143), ("worker", 7)])
def test_a_signal_to_the_whole_group_or_to_a_worker_leaves_the_steps_saved(whom, code, coco, tmp_path):
    run = tmp_path / "run"
    words = f"import small_runs; small_runs.train_with_workers({str(coco.train.parent.parent)!r}, {str(run)!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    process = subprocess.Popen([sys.executable, "-c", words], env={**os.environ, "PYTHONPATH": paths},
                               start_new_session=True)
    try:
        wait_for(run / "seen")
        if whom == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(60) == code
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert state_of(run)["step"] > 3


@pytest.mark.parametrize("later", [False, True], ids=["while it saves", "while it is rescued"])
def test_a_worker_that_dies_while_the_run_is_being_saved_loses_nothing(later, tmp_path, monkeypatch):
    """torch raises wherever the program is when a worker dies; here at the worst moment."""
    def dead(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    save, before = runs.save_atomically, signal.signal(signal.SIGCHLD, dead)

    def save_late(*words: object) -> None:
        os.kill(os.getpid(), signal.SIGCHLD)
        save(*words)

    monkeypatch.setattr(runs, "save_atomically", save_late)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            fit(replace(SHORT, folder=str(tmp_path), save_every=3600 if later else 0),
                watch=lambda run: dead(0, None) if later else None)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert state_of(tmp_path)["step"] >= 1


# --- what a checkpoint must hold ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[object, dict]:
    """A run of two steps, and its state."""
    folder = tmp_path_factory.mktemp("finished")
    config = replace(SHORT, steps=2, evaluations=0, folder=str(folder))
    fit(config)
    return config, state_of(folder)


def without(name):
    return lambda state: state.pop(name)


def spoilt(*path):
    def spoil(state):
        for name in path:
            state = state[name] if name is not None else next(iter(state.values()))
        state.view(-1)[0] = float("nan")

    return spoil


def reshaped(state):
    moments = state["optimizer"]["state"][0]
    moments["mean"] = moments["mean"].new_zeros(3, 5)


DAMAGES = {
    "optimizer": without("optimizer"), "history": without("history"), "raw_model": without("raw_model"),
    "model": without("model"), "averages": without("averages"), "step": without("step"),
    "'history' is a str": lambda state: state.update(history="long"),
    "mean of parameter 0": reshaped, "model\\.": spoilt("model", "queries.embedding.weight"),
}
MOMENTS = {r"optimizer\.state\.0\.mean": spoilt("optimizer", "state", 0, "mean")}


@pytest.mark.parametrize(("named", "damage"), [
    *(pytest.param(*pair, marks=pytest.mark.fault(
        "checkpoint.pt without optimizer / history / raw_model / model / averages")) for pair in DAMAGES.items()),
    *(pytest.param(*pair, marks=pytest.mark.fault("NaN in the optimiser's moments")) for pair in MOMENTS.items()),
])
def test_a_checkpoint_that_lacks_a_part_is_named_and_nothing_is_trained(named, damage, finished, tmp_path):
    config, state = finished[0], deepcopy(finished[1])
    damage(state)
    save_atomically(state, tmp_path / "checkpoint.pt")
    before = words_in(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)checkpoint\.pt \(\d+ bytes\) cannot be read .*{named}"):
        fit(replace(config, folder=str(tmp_path)), watch=pytest.fail)
    assert words_in(tmp_path) == before


def test_a_longer_run_is_told_how_to_go_on(finished):
    with pytest.raises(ValueError, match=r"steps: there 2, here 4\n.*--model FineTuned --model\.weights .*finished"):
        fit(replace(finished[0], steps=4))


@pytest.mark.fault("going on after the annotations were changed")
def test_going_on_with_other_annotations_is_said(coco, tmp_path, capsys):
    config = replace(LATE, data=coco, folder=str(tmp_path / "run"))
    ended(config, ZeroDivisionError, lambda run: 1 / (run.step - 2))
    capsys.readouterr()
    change(coco.train_file, lambda content: content["annotations"][2]["bbox"].__setitem__(0, 3))
    fit(config)
    assert re.search(r"the data have changed since .*checkpoint\.pt was written", capsys.readouterr().err)
    fit(config)
    assert "changed" not in capsys.readouterr().err


def test_a_pool_learns_that_one_of_its_runs_was_terminated():
    """Exceptions travel between processes as pickles; one that cannot be rebuilt breaks the whole pool."""
    there = pickle.loads(pickle.dumps(Terminated()))
    assert type(there) is Terminated and there.code == 143
