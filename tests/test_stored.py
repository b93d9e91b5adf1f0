"""What was saved before models had one description loads, goes on and agrees, to the bit on the same processor."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stored import (
    STORED,
    config,
    curve,
    processor,
    reference_answers,
    small_model,
    tiny_answers,
)
from torch import Tensor
from torch.testing import assert_close

from detr_nb.pretrained import load_pretrained, pretrained_model
from detr_nb.training import fit, read_config

RECORD = json.loads((STORED / "stored.json").read_text())
SAME_MACHINE = RECORD["processor"] == processor()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the order in which they were stored."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(ours: object, stored: object) -> None:
    """The same bits on the same kind of machine, the same numbers elsewhere."""
    tolerance = {"rtol": 0, "atol": 0} if SAME_MACHINE else {"rtol": 2e-3, "atol": 2e-3}
    assert_close(torch.as_tensor(ours), torch.as_tensor(stored), **tolerance)


def compare(ours: Mapping[str, Tensor], name: str) -> None:
    """Every stored array of a file, under its name."""
    stored = np.load(STORED / f"{name}.npz")
    assert sorted(ours) == sorted(stored.files)
    for key, value in ours.items():
        close(value.detach(), stored[key])


def test_the_small_trained_model_answers_as_it_did():
    compare(tiny_answers(), "tiny")


def test_the_reference_model_answers_as_it_did():
    compare(reference_answers(), "reference")


def images() -> tuple[Tensor, Tensor]:
    """The pictures of the stored folder's answers."""
    made = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return made, torch.zeros(2, 64, 64, dtype=torch.bool)


def test_a_folder_saved_then_loads_and_answers_as_it_did():
    model = pretrained_model(STORED / "model")
    assert (model.names, model.category_ids, model.threshold) == (["square", "disc", "star"], [3, 7, 9], 0.4)
    out = model(*images())
    compare({"logits": out.logits, "boxes": out.boxes}, "small")
    again = load_pretrained(small_model(), STORED / "model")
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_fresh_small_model_has_the_weights_that_it_had():
    compare(dict(zip(("logits", "boxes"), small_model()(*images()), strict=False)), "small")


def check_run(run) -> None:
    """The whole curve, and the sum of every weight."""
    for ours, stored in zip(curve(run), RECORD["curve"], strict=True):
        assert ours.keys() == stored.keys()
        for name, value in stored.items():
            if name != "metrics":
                close(ours[name], value)
        if SAME_MACHINE:
            assert repr(ours.get("metrics")) == repr(stored.get("metrics"))
    for name, value in run.model.state_dict().items():
        close(float(value.double().sum()), RECORD["sums"][name])


@pytest.mark.slow
def test_a_seed_has_the_curve_that_it_had():
    check_run(fit(config()))


@pytest.mark.slow
def test_a_run_stopped_then_goes_on_and_ends_as_it_would_have(tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(STORED / "run", folder)
    old = read_config(["--config", str(folder / "config.yaml")])
    check_run(fit(replace(old, folder=str(folder))))
    assert pretrained_model(folder).names
