"""Chapter 17: how things are measured, never how long they take."""

import json
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import detr_nb.bench as module
import detr_nb.measuring as measuring
from detr_nb.bench import (
    COMPARISONS,
    Bench,
    Growth,
    MemoryCase,
    bench,
    command_of,
    compare_data,
    compare_evaluation,
    compare_matching,
    compare_memory,
    exponent,
    growth,
    match_layer_by_layer,
    matching_problem,
    training_memory_mb,
    waiting_share,
)
from detr_nb.matcher import HungarianMatcher
from detr_nb.measuring import (
    Row,
    in_fresh_process,
    interleaved,
    resident_mb,
    rows_of,
    table,
)
from detr_nb.peers import (
    HF,
    MissingPeerError,
    Peer,
    compare_peers,
    faster_rcnn,
    hugging_face,
    inference,
    ours,
    random_batch,
    training_step,
)
from detr_nb.steps import activation_checkpointing
from detr_nb.terminal import options_parser, read_options

SMALL = random_batch(1, (64, 96), objects=3)


# --- clocks and rows ----------------------------------------------------------------------------------------------
def test_rounds_are_interleaved_and_the_warm_up_does_not_count():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=2)
    assert "".join(calls) == 5 * "abc"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(min(values) for values in times.values()) >= 0


def test_the_clock_waits_for_the_device_before_and_after(monkeypatch):
    events = []
    monkeypatch.setattr(measuring, "wait", lambda: events.append("wait"))
    measuring.seconds_of(lambda: events.append("work"))
    assert events == ["wait", "work", "wait"]


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_refused(rounds):
    with pytest.raises(ValueError, match="at least one round"):
        interleaved({"a": list}, rounds=rounds)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9), st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9))
def test_rows_hold_medians_and_their_ratios(a, b):
    first, second = rows_of("x", {"a": a, "b": b})
    assert first.ratio == 1 and first.against == second.against == "a"
    assert second.value == pytest.approx(np.median(b)) and first.value == pytest.approx(np.median(a))
    assert second.ratio == pytest.approx(np.median(b) / np.median(a)) and second.samples == tuple(b)


def test_the_base_may_be_named():
    rows = rows_of("x", {"a": [1.0], "b": [4.0]}, against="b")
    assert [row.ratio for row in rows] == [0.25, 1]


def test_the_table_begins_each_line_with_the_ratio():
    lines = table(rows_of("sums", {"loop": [0.5], "torch": [0.001]})).splitlines()
    assert lines[1] == "sums"
    assert lines[3].split() == ["0.002", "1.0", "ms", "torch", "(1.0", "to", "1.0)"]


# --- exponents ----------------------------------------------------------------------------------------------------
@given(st.floats(-3, 5), st.floats(1e-6, 1e6), st.sets(st.integers(1, 4096), min_size=2, max_size=8))
def test_the_exponent_of_an_exact_power_law_is_found(k, c, sizes):
    sizes = sorted(sizes)
    assert exponent(sizes, [c * n**k for n in sizes]) == pytest.approx(k, abs=1e-6)


@pytest.mark.parametrize("sizes, costs", [([1], [1]), ([2, 2], [1, 2]), ([0, 1], [1, 2]), ([1, 2], [0, 2]),
                                          ([1, 2, 3], [1, 2])])
def test_what_has_no_slope_is_refused(sizes, costs):
    with pytest.raises(ValueError, match="two different sizes"):
        exponent(sizes, costs)


def test_a_growth_says_how_steep_it_is_at_its_end():
    g = growth("x", [1, 2, 4], [1, 1, 4])
    assert g.last_exponent == pytest.approx(2) and 0 < g.exponent < 2


# --- matching -----------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 30), st.integers(0, 12))
def test_the_straightforward_matcher_gives_the_same_assignment(images, layers, queries, objects):
    out, targets = matching_problem(images, layers, queries, objects, classes=4)
    pairs = zip(HungarianMatcher()(out, targets), match_layer_by_layer(out, targets), strict=True)
    for mine, theirs in pairs:
        for (query, target), (query2, target2) in zip(mine, theirs, strict=True):
            assert torch.equal(query, query2) and torch.equal(target, target2)


def test_the_matching_of_a_step_leaves_the_device_once(monkeypatch):
    out, targets = matching_problem(images=2, queries=10, objects=3)
    leaving, plain = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: leaving.append(self) or plain(self))
    HungarianMatcher()(out, targets)
    assert len(leaving) == 1
    match_layer_by_layer(out, targets)
    assert len(leaving) == 1 + 6


def test_problems_are_the_same_at_every_call():
    first, second = matching_problem(images=2), matching_problem(images=2)
    assert torch.equal(first[0].logits, second[0].logits) and torch.equal(first[1][1]["boxes"], second[1][1]["boxes"])


def test_comparing_names_what_was_compared():
    rows = compare_matching(1, images=1, layers=2, queries=5, objects=3)
    assert [row.name for row in rows] == ["layer by layer", "all at once"]
    assert rows[0].comparison == "matching: 1 images, 2 layers, 5 queries, 3 targets"


# --- peers --------------------------------------------------------------------------------------------------------
def learning(peer: Peer) -> int:
    return sum(p.numel() for p in peer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_hugging_face_has_the_same_parameters_that_learn(backbone):
    mine, theirs = ours(backbone), hugging_face(backbone)
    assert learning(mine) == learning(theirs)
    assert sum(p.numel() for p in mine.model.parameters()) == sum(p.numel() for p in theirs.model.parameters())
    drops = {p for p in (theirs.model.config.dropout, theirs.model.config.attention_dropout,
                         theirs.model.config.activation_dropout)}
    assert drops == {0.1}


@pytest.mark.parametrize("build", [ours, hugging_face, faster_rcnn])
def test_a_step_moves_what_learns_and_nothing_else(build):
    torch.manual_seed(0)
    peer = build("resnet18")
    before = {name: p.detach().clone() for name, p in peer.model.named_parameters()}
    training_step(peer, SMALL)()
    moved = {name for name, p in peer.model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, p in peer.model.named_parameters() if not p.requires_grad}
    assert moved and frozen and not moved & frozen
    assert peer.loss(SMALL).isfinite()


def test_predictions_ask_for_no_gradient_and_leave_training_mode():
    peer = ours("resnet18")
    asked = []
    watched = Peer(peer.model, peer.loss, lambda batch: asked.append(torch.is_grad_enabled()))
    inference(watched, SMALL)()
    assert asked == [False] and not peer.model.training


def test_without_transformers_the_others_are_still_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPeerError, match="pip install transformers"):
        hugging_face("resnet18")
    rows = compare_peers(inference, "resnet18", SMALL, 1, bf16=True, names=(HF, "ours"))
    assert [row.name for row in rows] == ["ours", "ours, bf16"] and rows[0].ratio == 1
    assert "pip install transformers" in capsys.readouterr().out


# --- memory -------------------------------------------------------------------------------------------------------
def test_recomputing_changes_no_gradient():
    def gradients(peer):
        torch.manual_seed(1)
        peer.model.train().zero_grad()
        peer.loss(SMALL).backward()
        return {name: p.grad.clone() for name, p in peer.model.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    peer = ours("resnet18")
    expected = gradients(peer)
    with activation_checkpointing(peer.model):
        found = gradients(peer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_fresh_process_does_not_inherit_our_peak():
    fat = torch.ones(80_000_000)
    assert in_fresh_process(resident_mb) < resident_mb()
    del fat


@pytest.mark.slow
def test_memory_is_compared_in_fresh_processes():
    rows = compare_memory([MemoryCase("ours"), MemoryCase("ours", recomputed=True)], "resnet18", 2, (192, 256))
    assert [row.name for row in rows] == ["ours", "ours, recomputed"] and rows[0].unit == "MB"
    parameters = 28_843_552 * 4 / 1e6
    assert rows[0].value > 3 * parameters and rows[1].ratio < 1


def test_memory_counts_the_parameters_and_more():
    assert training_memory_mb(MemoryCase("ours"), "resnet18", 1, (64, 64), steps=1) > 28_843_552 * 4 / 1e6


# --- data and evaluation ------------------------------------------------------------------------------------------
def test_the_share_of_waiting_is_that_of_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def batches():
        while True:
            now[0] += 1
            yield SMALL

    def step(_):
        now[0] += 3

    assert waiting_share(batches(), step, count=4) == pytest.approx(0.25)


@pytest.mark.slow
def test_both_loaders_are_measured():
    rows = compare_data(1, workers=0)
    assert [row.name for row in rows] == ["generated, in memory", "COCO folder, augmented"]
    assert all(0 <= row.value <= 1 for row in rows)


def test_evaluation_is_compared_with_pycocotools_alone():
    rows = compare_evaluation(images=4, rounds=2)
    assert [(row.name, len(row.samples)) for row in rows] == [("pycocotools", 2), ("coco_evaluate", 2)]


# --- the command --------------------------------------------------------------------------------------------------
def test_every_flag_is_explained():
    for field in fields(Bench):
        assert f"        {field.name}: " in Bench.__doc__


@pytest.mark.parametrize("wrong, words", [
    ({"only": ("speed",)}, "the comparisons are training"), ({"backbones": ("vgg16",)}, "resnet18, resnet50"),
    ({"rounds": 0}, "at least 1"), ({"batch": 0}, "at least 1"), ({"size": (32, 64)}, "at least 64"),
])
def test_options_that_make_no_sense_are_refused_before_anything_is_measured(wrong, words, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda options: pytest.fail("measured"))
    with pytest.raises(ValueError, match=words):
        bench(Bench(**wrong))


def test_a_record_that_cannot_be_written_is_found_out_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda options: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "record.json"):
        with pytest.raises(OSError):
            bench(Bench(out=out))


def test_the_record_holds_everything(tmp_path, monkeypatch, capsys):
    rows, growths = rows_of("x", {"a": [1.0, 3.0], "b": [2.0]}), [growth("y", [1, 2], [1, 4])]
    monkeypatch.setattr(module, "measure", lambda options: iter([rows, growths]))
    out = tmp_path / "new" / "record.json"
    assert bench(Bench(rounds=3, out=out)) == 0
    record = json.loads(out.read_text("utf8"))
    assert set(record) == {"what", "command", "date", "machine", "load", "versions", "rows", "growths"}
    assert record["command"] == "detr-nb bench --rounds 3" and {"processor", "threads"} <= set(record["machine"])
    assert {"torchvision", "pycocotools"} <= set(record["versions"])
    assert [Row(**row | {"samples": tuple(row["samples"])}) for row in record["rows"]] == rows
    found = [Growth(**g | {"sizes": tuple(g["sizes"]), "costs": tuple(g["costs"])}) for g in record["growths"]]
    assert found == growths
    printed = capsys.readouterr().out
    assert "1.000" in printed and "2.00   2.00  y" in printed


@pytest.mark.parametrize("options, command", [
    (Bench(), "detr-nb bench"),
    (Bench(rounds=1, bf16=False, out=Path("x.json")), "detr-nb bench --rounds 1 --bf16 false"),
    (Bench(only=("data", "growth"), bf16=True, size=(64, 96)),
     "detr-nb bench --only '[data, growth]' --size '[64, 96]' --bf16 true"),
])
def test_the_command_runs_it_again(options, command):
    assert command_of(options) == command
    words = shlex.split(command)[2:]
    assert read_options(Bench, options_parser(Bench), words) == replace(options, out=None)


def test_a_small_bench_runs(tmp_path):
    out = tmp_path / "record.json"
    assert bench(Bench(only=("matching", "evaluation"), rounds=1, images=3, out=out)) == 0
    rows = json.loads(out.read_text("utf8"))["rows"]
    assert len({row["comparison"] for row in rows}) == 2
    assert all(row["value"] == pytest.approx(median(row["samples"])) for row in rows)
    assert set(COMPARISONS) >= {"matching", "evaluation"}
