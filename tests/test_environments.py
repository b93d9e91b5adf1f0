"""The programs that try the project elsewhere: in other people's environments, and beside a graphics card."""

import importlib.util
import json
import re
from io import StringIO
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from detr_nb.model import TinyModel

ROOT = Path(__file__).resolve().parents[1]


def load(path: str):
    """A program of this repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runner(tmp_path, monkeypatch):
    module = load("tools/run_notebooks.py")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def notebook(path: Path, *cells: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


@pytest.mark.slow
def test_a_notebook_that_fails_is_kept_and_one_that_passed_is_not_run_again(runner, tmp_path):
    good = notebook(tmp_path / "nbs" / "good.ipynb", "open('ran', 'a').write('x')")
    bad = notebook(tmp_path / "nbs" / "bad.ipynb", "1", "1 / 0")
    keep, before = tmp_path / "keep", good.read_text("utf8")
    rows = runner.run_all([good, bad], keep, 1e6, 60)
    assert [row["error"] for row in rows] == [None, "cell 1: ZeroDivisionError: division by zero"]
    assert (keep / "nbs_bad.ipynb").exists() and not (keep / "nbs_good.ipynb").exists()
    assert good.read_text("utf8") == before
    notebook(bad, "1")
    with (keep / "done.jsonl").open("a") as file:
        file.write('{"notebook": "cut o')
    assert [row["notebook"] for row in runner.run_all([good, bad], keep, 1e6, 60)] == ["nbs/bad.ipynb"]
    assert (tmp_path / "nbs" / "ran").read_text() == "x"
    assert runner.run_all([notebook(tmp_path / "nbs" / "late.ipynb", "1")], keep, -1, 60) == []


@pytest.mark.parametrize("name", ["colab", "oldest"])
def test_a_list_of_versions_is_one_that_the_package_allows(name):
    rows = dict(line.split("==") for line in (ROOT / "tools" / f"{name}.txt").read_text().splitlines() if "==" in line)
    versions = {re.sub("[-_]", "-", key.lower()): value for key, value in rows.items()}
    text = (ROOT / "pyproject.toml").read_text("utf8")
    block = text.split("dependencies = [")[1].split("\n]")[0]
    wanted = [Requirement(found) for found in re.findall(r'"([^"]+)"', block)]
    assert len(wanted) > 12
    for need in wanted:
        have = versions.get(re.sub("[-_]", "-", need.name.lower()))
        if have is None:
            assert name == "colab" and need.name == "jaxtyping", f"{need.name} is not in the list"
            continue
        assert Version(have) in need.specifier, f"{need} excludes {have}"
        bound = next((spec.version for spec in need.specifier if spec.operator == ">="), None)
        assert name != "oldest" or bound is None or Version(have).release[:2] == Version(bound).release[:2], need


def test_the_use_of_a_card_is_read_from_what_was_written_so_far():
    gpu = load("results/train_on_gpu.py")
    assert gpu.card_use(StringIO("90, 1000\n100, 3000\n80, 20")) == {"busy": 90.0, "memory_mb": 3000.0}
    assert gpu.card_use(StringIO("[N/A], 5\n")) is None and gpu.card_use(None) is None


@pytest.mark.parametrize("small", [False, True])
def test_a_member_on_a_card_has_the_sizes_of_detr(small):
    gpu = load("results/train_on_gpu.py")
    plain = TinyModel() if small else gpu.COMMON.model
    for kind in ("ConditionalDETR", "AnchorDETR", "DABDETR", "SMCADETR", "DNDETR"):
        member = gpu.member(kind, small)
        assert type(member).__name__ == kind and member.temperature == plain.temperature
        assert {name: getattr(member, name) for name in gpu.SIZES} == {name: getattr(plain, name) for name in gpu.SIZES}
        assert (member.backbone.widths, member.backbone.strides) == (plain.widths, plain.strides)


@pytest.mark.slow
def test_a_record_of_a_run_beside_a_card_says_whether_it_is_finished(tmp_path, monkeypatch):
    """The whole way at small size, on a processor; nothing stays in the repository's results."""
    gpu = load("results/train_on_gpu.py")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    records = []
    for limit in ("0", "12"):  # over after the first row; then goes on
        monkeypatch.setattr("sys.argv", ["train_on_gpu.py", "--anywhere", "--minutes", "0.1", "--in_all", limit])
        gpu.main()
        file = tmp_path / ".cache" / "runs" / "gpu_shapes_0.1min_seed0_small.json"
        records.append(json.loads(file.read_text("utf8")))
    cut, record = records
    assert not cut["finished"] and cut["steps"] == 2 and record["curve"][0] == cut["curve"][0]
    assert record["finished"] and record["card"] is None and record["steps"] > 0
    assert record["seconds_in_all"] > record["seconds"] > 1 and "AP" in record["metrics"] and record["curve"]
