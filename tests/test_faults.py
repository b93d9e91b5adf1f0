"""Runs that are killed, told to end, starved of disk, or fed with what nobody can learn from."""

import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import small_runs
import torch
from small_runs import CONFIG, Deadly, Drawn, series, wait_for

import detr_nb.training as training
from detr_nb.checks import DataError
from detr_nb.formats import CocoData, CocoDataset, Sizes, write_coco
from detr_nb.loading import Augmented, MemoryDataset, batches
from detr_nb.matcher import NotFinite
from detr_nb.runs import save_atomically
from detr_nb.shapes import EASY, Scenes
from detr_nb.steps import checked_step
from detr_nb.training import build_criterion, check_before, create_run, fit

SHORT = replace(CONFIG, steps=6, evaluations=1, log_every=2, ema=0)


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
