"""Train the small detector with other queries, or with another matching, one setting a run.

    python results/query_laboratory.py                                all that is missing
    python results/query_laboratory.py --names "5 queries" "learned content"
    python results/query_laboratory.py --list

Settings that query_laboratory.json holds are not run again. Each makes the same number of steps on the default scenes,
about three minutes of two quiet cores (more with 100 and 300 queries); memory stays under 3 GB.
"""
import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from detr_nb.data import MemoryDataset
from detr_nb.evaluation import coco_evaluate
from detr_nb.insight import Filmed, count_repeats, drop_repeats, matched_queries, only_layer, predict_layers
from detr_nb.measuring import describe_machine
from detr_nb.model import DETR, ObjectQueries, detr_tiny, postprocess
from detr_nb.notation import Memory, Queries
from detr_nb.shapes import DEFAULT
from detr_nb.training import ShapesData, TinyModel, TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "results" / "query_laboratory.json"


class ContentQueries(ObjectQueries):
    """Object queries whose content is learned too, instead of zero."""

    def __init__(self, count: int, d: int):
        super().__init__(count, d)
        self.content = nn.Embedding(count, d)

    def forward(self, memory: Memory, targets: object = None) -> Queries:
        """The same queries for every image."""
        return super().forward(memory)._replace(content=self.content.weight.expand(len(memory.x), -1, -1))


@dataclass(frozen=True)
class LearnedContent(TinyModel):
    """The small model with `ContentQueries`."""

    def build(self, num_classes: int) -> DETR:
        """Make it with fresh weights."""
        model = detr_tiny(num_classes=num_classes, **asdict(self))
        model.queries = ContentQueries(self.num_queries, self.hidden_dim)
        return model


@dataclass(frozen=True)
class Copies(ShapesData):
    """Scenes whose training targets list every object several times: one-to-many matching by the one-to-one matcher.

    Args:
        copies: how often each object is listed.
    """

    copies: int = 1

    def load(self) -> tuple[MemoryDataset, MemoryDataset]:
        """The training series with copies, and the held-out series without."""
        train, held_out = super().load()
        for target in train.targets:
            target["labels"] = target["labels"].repeat(self.copies)
            target["boxes"] = target["boxes"].repeat(self.copies, 1)
        return train, held_out


DATA = Copies(DEFAULT, cache=".cache/scenes")
BASE = TrainConfig(data=DATA, model=TinyModel(), steps=1200, evaluations=1, bf16=True, seed=0, progress=False)
SETTINGS = {f"{n} queries": replace(BASE, model=TinyModel(num_queries=n)) for n in (5, 10, 16, 30, 100, 300)} | {
    "learned content": replace(BASE, model=LearnedContent()),
    "one-to-one, 32 queries": replace(BASE, model=TinyModel(num_queries=32)),
    "one-to-many, 32 queries": replace(BASE, model=TinyModel(num_queries=32), data=replace(DATA, copies=2)),
    "one-to-three, 32 queries": replace(BASE, model=TinyModel(num_queries=32), data=replace(DATA, copies=3)),
}


def judge(model: DETR, data: MemoryDataset) -> dict[str, object]:
    """AP of the last layer with and without NMS, and for each layer AP and repeats."""
    out, targets = predict_layers(model, data)
    layers = []
    for layer in range(len(out.boxes)):
        found = postprocess(only_layer(out, layer), [target["size"] for target in targets])
        shares = postprocess(only_layer(out, layer), [(1, 1)] * len(targets))
        plain = coco_evaluate(targets, found, data.names, data.category_ids)
        nms = coco_evaluate(targets, [drop_repeats(row) for row in found], data.names, data.category_ids)
        layers.append({
            **{key: round(plain[key], 4) for key in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AR_100")},
            "AP_nms": round(nms["AP"], 4), "repeats": round(sum(map(count_repeats, shares, targets)) / len(targets), 3),
        })
    used = (model.scores(out.logits[-1]).amax(-1) > 0.5).float().mean(0)
    return {**layers[-1], "layers": layers, "queries_used": int((used > 0.01).sum())}


def instability(build: DETR, film: dict, data: MemoryDataset) -> dict[str, list]:
    """The share of objects whose matched query changes from one copy of the weights to the next, at each layer."""
    before, rows = None, []
    for weights in film.values():
        build.load_state_dict(weights)
        now = matched_queries(*predict_layers(build, data))
        rows += [] if before is None else [[round(float(share), 4) for share in (now != before).float().mean(1)]]
        before = now
    return {"steps": list(film)[1:], "changed": rows}


def run_setting(name: str, config: TrainConfig, copies: int) -> dict[str, object]:
    """Train one setting and return its row."""
    camera = Filmed(config.model, every=max(config.steps // copies, 1))
    run = fit(replace(config, model=camera))
    val = config.data.series(config.data.val_images, seed=2)
    metrics = judge(run.model, val)
    film = {**camera.film, run.step: {key: value.clone() for key, value in run.model.state_dict().items()}}
    few = MemoryDataset(val.images[:200], val.targets[:200], val.names, val.category_ids)
    return {
        "name": name, "date": time.strftime("%Y-%m-%d"), "seed": config.seed, "config": asdict(config),
        "steps": run.step, "seconds": round(run.seconds, 1),
        "milliseconds_per_step": round(1000 * run.seconds / run.step, 1), "metrics": metrics,
        "instability": instability(run.model, film, few), "machine": describe_machine(),
    }


def write(rows: list[dict], file: Path, command: str) -> None:
    """Write all rows in the order of `SETTINGS`."""
    order = list(SETTINGS)
    record = {
        "what": "other numbers and kinds of queries, and other matchings, at equal steps; default setting, one seed",
        "command": command, "date": max(row["date"] for row in rows), "machine": describe_machine(),
        "rows": sorted(rows, key=lambda row: order.index(row["name"])),
    }
    file.write_text(json.dumps(record, indent=1, default=str) + "\n")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), help="only these")
    parser.add_argument("--steps", type=int, default=BASE.steps, help="optimiser steps of each run")
    parser.add_argument("--images", type=int, default=DATA.train_images, help="length of the training series")
    parser.add_argument("--copies", type=int, default=12, help="copies of the weights kept for the instability")
    parser.add_argument("--file", type=Path, default=FILE, help="where the rows go")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and stop")
    args = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_flush_denormal(True)
    rows = json.loads(args.file.read_text())["rows"] if args.file.exists() else []
    there = {row["name"] for row in rows}
    if args.list:
        print("\n".join(f"{'recorded' if name in there else 'missing':9} {name}" for name in SETTINGS))
        return
    changed = "" if args.steps == BASE.steps else f" --steps {args.steps}"
    changed += "" if args.images == DATA.train_images else f" --images {args.images}"
    for name in (name for name in args.names if name not in there):
        config = replace(SETTINGS[name], steps=args.steps)
        config = replace(config, data=replace(config.data, train_images=args.images))
        rows.append(run_setting(name, config, args.copies))
        write(rows, args.file, f"python results/query_laboratory.py{changed}")
        row = rows[-1]
        print(f"{name:26} {row['seconds']:.0f} s  " + ", ".join(
            f"{key} {row['metrics'][key]:.3f}" for key in ("AP", "AP_nms", "repeats")), flush=True)


if __name__ == "__main__":
    main()
