"""Two processes and accumulated parts against one process with the whole batch, by torch's own launcher."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import LONELY, MEMBERS, SHARED, gradients, lonely_member
from torch.testing import assert_close

from detr_nb.training import fit

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder in which two processes left what they found."""
    folder = tmp_path_factory.mktemp("shared")
    code = f"import small_runs; small_runs.two_processes({str(folder)!r})"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
               sys.executable, "-c", code]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, object]:
    """The same in this process, with the whole batch at once."""
    return gradients(SHARED, 1)


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_have_the_gradient_of_one(shared, alone, parts):
    """A batch of seven: one process has four images, the other three."""
    found = torch.load(shared / "gradients.pt", weights_only=True)[parts]
    size = float(alone["gradient"].abs().max())
    assert_close(found["gradient"], alone["gradient"], rtol=1e-4, atol=1e-5 * size)
    assert found["total"] == pytest.approx(alone["total"], rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_accumulated_parts_have_the_gradient_of_the_whole(alone, parts):
    found = gradients(SHARED, parts)
    size = float(alone["gradient"].abs().max())
    assert_close(found["gradient"], alone["gradient"], rtol=1e-4, atol=1e-5 * size)


def test_a_mean_of_means_has_another_gradient(alone):
    """So the checks above can fail: parts with denominators of their own are what must not happen."""
    found = gradients(SHARED, 2, mean_of_means=True)["gradient"]
    assert (found - alone["gradient"]).norm() > 0.003 * alone["gradient"].norm()


def test_five_images_over_two_processes_are_counted_once(shared, alone):
    found = torch.load(shared / "gradients.pt", weights_only=True)
    assert found[1]["metrics"] == alone["metrics"]


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_member_learns_on_though_one_process_sees_no_object(shared, kind):
    """Of four images one has objects, so in each step one of the two processes has none; both keep the same weights."""
    (step, total, state), other = (torch.load(shared / f"{kind}{i}.pt", weights_only=True) for i in range(2))
    assert step == other[0] == 3 and math.isfinite(total)
    learned = {name for name in state if "running" not in name and "num_batches" not in name}
    for name in learned:  # each process has statistics of its own
        assert torch.equal(state[name], other[2][name]) and state[name].isfinite().all(), name
    torch.manual_seed(LONELY.seed)
    fresh = lonely_member(kind).build(5).state_dict()
    assert sum(not torch.equal(state[name], fresh[name]) for name in learned) > 0.8 * len(learned)


def test_a_run_of_two_processes_is_told_to_end_and_goes_on_in_one(shared):
    """SIGTERM came to one of them; both saved the same step and left with 143."""
    assert [(shared / f"code{i}").read_text() for i in range(2)] == ["143", "143"]
    saved = torch.load(shared / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 8  # told while it wrote the row of step 7, it finished one more step
    resumed, whole = fit(replace(SHARED, folder=str(shared / "run"))), fit(SHARED)
    assert resumed.step == whole.step == 12 and len(resumed.history) == len(whole.history)
    for row, expected in zip(resumed.history, whole.history, strict=True):
        assert row["total"] == pytest.approx(expected["total"], rel=1e-3)
    for name, value in whole.model.state_dict().items():
        assert_close(resumed.model.state_dict()[name], value, rtol=1e-3, atol=2e-3, msg=lambda text, n=name: n + text)
