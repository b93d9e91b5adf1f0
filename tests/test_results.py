"""Recorded runs: one schema, no place of a machine, and the front page says what they say."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest

from detr_nb.training import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "results").glob("*.json"))
RUNS = [path for path in RECORDS if path.stem.startswith("shapes_")]


def read(path: Path) -> dict:
    """A record, read as strictly as other languages read it."""
    return json.loads(path.read_text("utf8"), parse_constant=refuse)


def refuse(word: str) -> None:
    """JSON has no NaN and no Infinity, though Python writes and reads them."""
    raise ValueError(f"{word} is no JSON")


def test_there_are_records():
    assert len(RUNS) >= 2


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_by_which_command_where_and_when(path):
    row = read(path)
    assert {"what", "command", "date", "machine"} <= set(row)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"])
    assert {"processor", "cores", "torch"} <= set(row["machine"])
    path_like = r'"(/|[A-Z]:\\)[^"]{0,1000}"'  # pictures and weights in base64 are longer
    assert not re.search(path_like, path.read_text("utf8")), "a path of a machine"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_recorded_run_is_the_one_that_its_name_and_command_say(path):
    row = read(path)
    setting, budget, paper, seed = re.fullmatch(r"shapes_(easy|default)_(\w+?)_(paper_)?seed(\d)", path.stem).groups()
    assert f"--setting {setting}" in row["command"] and bool(paper) == ("--paper" in row["command"])
    assert row["seed"] == row["config"]["seed"] == int(seed)
    assert {"data", "model", "lr"} <= set(row["config"]) <= {field.name for field in fields(TrainConfig)}
    amount, unit = re.fullmatch(r"(\d+)(min|steps)", budget).groups()
    if unit == "min":
        assert row["config"]["minutes"] == int(amount) and 0 <= row["seconds"] - 60 * int(amount) < 2
    assert row["curve"][-1]["metrics"] == row["metrics"] and row["curve"][-1]["step"] == row["steps"]
    assert row["machine"]["matrix_gflops"] > 1 and row["milliseconds_per_step"]["backbone"] > 0
    assert sum(row["milliseconds_per_step"].values()) * row["steps"] / 1000 == pytest.approx(row["seconds"], rel=0.05)


def test_the_table_of_results_says_what_the_records_say():
    text, shown = (ROOT / "README.md").read_text("utf8"), []
    table = re.search(r"<!-- RESULTS:BEGIN -->(.*)<!-- RESULTS:END -->", text, re.S)[1]
    for line in table.splitlines():
        files = re.findall(r"\(results/(\w+)\.json\)", line)
        if files:
            rows = [read(ROOT / "results" / f"{name}.json") for name in files]
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[2] == str(len(files))
            assert cells[3:5] == [f"{mean(row['metrics'][name] for row in rows):.3f}" for name in ("AP", "AP50")]
            shown += files
    assert sorted(shown) == [path.stem for path in RUNS], "every recorded run stands in the table, once"


def test_the_sentence_on_photographs_says_what_its_record_says():
    text = (ROOT / "README.md").read_text("utf8")
    row = read(ROOT / "results" / "bccd_20min_seed0.json")
    assert f"AP {row['metrics']['AP']:.3f}, AP50 {row['metrics']['AP50']:.3f} on the 87" in text
    assert row["command"] in text and row["config"]["minutes"] == 20 and 0 <= row["seconds"] - 1200 < 2


def test_the_table_of_steps_says_what_its_records_say():
    """Ours and Hugging Face's as shipped, each as a share of Hugging Face's with the same dropouts as ours."""
    ratios = {}
    for name in ("performance", "performance_paper_size"):
        for row in read(ROOT / "results" / f"{name}.json")["rows"]:
            ratios[row["comparison"], row["name"]] = row["ratio"]
    text = (ROOT / "README.md").read_text("utf8")
    table = re.search(r"^\| \| (ResNet.*)\n.*\n((?:\|.*\n)+)", text, re.M)
    cases = [cell.strip().lower().replace("-", "").split(", ") for cell in table[1].strip("| ").split("|")]
    names = ("ours", "Hugging Face, two dropouts off", "ours, two dropouts off")
    for line, name in zip(table[2].splitlines(), names, strict=True):
        said = [cell.strip() for cell in line.strip("| ").split("|")][1:]
        assert said == [f"{ratios[f'training step: {net}, 2 x {size}', name]:.2f}" for net, size in cases], name
    steps = [[ratios[f"training step: {net}, 2 x {size}", name] for net, size in cases] for name in names]
    faster = sum(shipped < ours for ours, shipped, _ in zip(*steps, strict=True))
    assert faster == 3 and "in three of the four cases Hugging Face's as shipped is faster than ours with all" in text
    assert all(without < shipped for _, shipped, without in zip(*steps, strict=True))
    assert "ours is faster than Hugging Face's as shipped in all four" in text


def test_the_race_of_the_family_is_one_recipe_for_all():
    rows = {row["name"]: row for row in read(ROOT / "results" / "family_race.json")["rows"]}
    kept = ("data", "batch_size", "lr", "lr_backbone", "lr_muon", "beta2", "weight_ce", "scales", "evaluations", "bf16")
    recipes = {json.dumps({key: row["config"][key] for key in kept}) for row in rows.values()}
    same = ("backbone", "num_queries", "hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "dropout")
    sizes = {json.dumps({key: row["config"]["model"][key] for key in same}) for row in rows.values()}
    assert len(recipes) == len(sizes) == 1
    for name, row in rows.items():
        what, seed = name.rsplit(", seed ", 1)
        assert row["steps"] == row["config"]["steps"] == (4000 if what == "DETR" else 2400)
        assert row["config"]["seed"] == int(seed) and f'--names "{name}"' in row["command"]
        assert row["curve"][-1]["metrics"] == row["metrics"] and row["curve"][-1]["step"] == row["steps"]
        seen = [one["step"] for one in row["curve"] if "metrics" in one]
        assert [(one["from"], one["to"]) for one in row["matches"]] == list(pairwise(seen))
    assert {name.rsplit(", seed ", 1)[1] for name in rows} == {"0", "1"}


def test_the_table_of_the_family_says_what_its_record_says():
    """And the bar: DAB-DETR with denoising reaches DETR's AP of ten minutes in 60 per cent of its steps."""
    found = {}
    for row in [row for name in ("race", "sampling") for row in read(ROOT / "results" / f"family_{name}.json")["rows"]]:
        found.setdefault(row["name"].rsplit(", seed ", 1)[0], []).append(row)
    table = re.search(r"<!-- FAMILY:BEGIN -->(.*)<!-- FAMILY:END -->", (ROOT / "README.md").read_text("utf8"), re.S)[1]
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines() if "| 0." in line]
    said = {name: (steps, ap) for name, steps, ap in lines}
    assert said == {name: (f"{rows[0]['steps']:,}", ", ".join(f"{row['metrics']['AP']:.3f}" for row in rows))
                    for name, rows in found.items()}
    ap = {name: [row["metrics"]["AP"] for row in rows] for name, rows in found.items()}
    assert min(ap["DNDETR"]) > max(ap["DETR"]) + 0.04 and len(ap["DNDETR"]) == len(ap["DETR"]) == 2
    assert all(min(ap[name]) > max(ap["DETR"]) + 0.04 for name in ("DeformableDETR", "TwoStageDETR", "DINO"))


def test_the_members_that_sample_have_the_recipe_of_the_race_and_no_more_time_than_detr():
    race, sampled = (read(ROOT / "results" / f"family_{name}.json")["rows"] for name in ("race", "sampling"))
    kept = ("data", "batch_size", "lr", "lr_backbone", "lr_muon", "beta2", "weight_ce", "scales", "evaluations", "bf16")
    same = ("backbone", "num_queries", "hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "dropout")
    recipes = {json.dumps([row["config"][key] for key in kept]) for row in (*race, *sampled)}
    sizes = {json.dumps([row["config"]["model"][key] for key in same]) for row in (*race, *sampled)}
    assert len(recipes) == len(sizes) == 1
    ratios = {row["name"]: row["ratio"] for row in read(ROOT / "results" / "run_costs.json")["rows"]}
    assert ratios["DETR"] == 1
    for row in sampled:
        what, seed = row["name"].rsplit(", seed ", 1)
        assert row["config"]["seed"] == int(seed) and f'--names "{row["name"]}"' in row["command"]
        assert row["steps"] * ratios[what] < 1.05 * 4000 and row["curve"][-1]["metrics"] == row["metrics"]


RUNNER = '''
import sys
from pathlib import Path

sys.path.insert(0, {results!r})
from side_by_side import run_missing


def make(name):
    if name == "bad":
        raise ValueError("no luck")
    return {{"metrics": {{"AP": 0.5}}, "seconds": 1.0}}


if __name__ == "__main__":
    run_missing(["bad", "good"], make, Path({folder!r}) / "trial.json", "a trial", "")
'''


def test_a_run_that_fails_is_named_and_those_beside_it_are_recorded(tmp_path):
    (tmp_path / "trial.py").write_text(RUNNER.format(results=str(ROOT / "results"), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, str(tmp_path / "trial.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "1 of 2 runs failed: bad; give the command again" in done.stderr
    assert "bad failed: ValueError('no luck')" in done.stdout
    assert [row["name"] for row in read(tmp_path / "trial.json")["rows"]] == ["good"]
