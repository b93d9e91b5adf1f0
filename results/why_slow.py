"""Does a query look at its object, and does an object keep its query? DETR beside the same model with places.

    python results/why_slow.py                    all that is missing
    python results/why_slow.py --names "DETR, seed 0"
    python results/why_slow.py --steps 40         a trial; it is kept under .cache/ and leaves the record alone
    python results/why_slow.py --list

The runs go one after the other, on one core, of three to ten minutes each. Weights are kept at evenly spread steps, and
the held-out scenes are looked at with each copy when a run has ended.
"""
import argparse
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from side_by_side import ROOT, named_row, one_thread, read_rows, say_ap, write_rows
from torch import Tensor, nn

from detr_nb.evaluation import batch_maker, evaluate
from detr_nb.family.references import ReferenceQueries, RefiningHead, reference_sine
from detr_nb.insight import (
    WeightSnapshots,
    attention_maps,
    cells_inside,
    matched_queries,
    predict_layers,
    share_inside,
)
from detr_nb.loading import MemoryDataset, ShapesData
from detr_nb.model import DETR, MLP, TINY, TINY_STRIDES, DETRConfig, TinyConfig
from detr_nb.notation import Memory
from detr_nb.shapes import EASY
from detr_nb.training import TrainConfig, fit
from detr_nb.transformer import Decoder, DecoderLayer, QueryPosition

STEPS, COPIES, SEEDS = 1200, 8, (0, 1)
WHAT = "DETR beside the same model whose queries have places: AP, attention inside the matched boxes, changed matches"


# --- as in chapter 30 ---------------------------------------------------------------------------------------------
class PlacePosition(nn.Module):
    """A query stands at its reference box: the sines of the box, through a small network."""

    def __init__(self, d: int):
        super().__init__()
        self.width, self.map = d // 2, MLP(2 * d, d, d)

    def forward(self, layer: int, content: Tensor, pos: None, ref: Tensor, memory: Memory) -> QueryPosition:
        """The same for both kinds of attention."""
        place = self.map(reference_sine(ref, self.width))
        return QueryPosition(place, place)


@dataclass(frozen=True)
class PlacedDETR(DETRConfig):
    """DETR with one change: every query starts at a box of its own, and every layer moves the box."""

    def queries(self, columns: int, memory: nn.Module) -> nn.Module:
        """Boxes, and no content."""
        return ReferenceQueries(self.num_queries, self.hidden_dim)

    def decoder(self, columns: int, memory: nn.Module, queries: nn.Module) -> nn.Module:
        """Layers that know where a query stands."""
        layers = [DecoderLayer(*self.layer_sizes()) for _ in range(self.dec_layers)]
        norm = nn.LayerNorm(self.hidden_dim)
        head = RefiningHead(self.hidden_dim, columns)
        return Decoder(layers, norm, head, PlacePosition(self.hidden_dim))


# --- the runs -----------------------------------------------------------------------------------------------------
SMALL = {"backbone": TinyConfig((32, 64, 128), TINY_STRIDES), "num_queries": 16, **TINY}
SCENES = replace(EASY, size=64, min_side=0.2)  # as large as a core trains on in minutes
DATA = ShapesData(SCENES, train_images=8192, val_images=200, cache=".cache/scenes")
# pictures keep their size, so that a copy from any moment is examined on what it has learned from
BASE = TrainConfig(data=DATA, steps=STEPS, evaluations=0, scales=(), progress=False)
MODELS = {"DETR": DETRConfig(**SMALL), "with places": PlacedDETR(**SMALL)}
RUNS = {f"{name}, seed {seed}": replace(BASE, model=model, seed=seed)
        for seed in SEEDS for name, model in MODELS.items()}


@torch.no_grad()
def attention_inside(model: DETR, data: MemoryDataset, matched: Tensor) -> tuple[list[float], float]:
    """The share of the cross-attention of matched queries that falls into the boxes of their objects, for each layer;
    and the share of the picture's cells that lie there, which is what uniform attention would give.

    Args:
        model: a DETR whose attention is dense.
        data: held-out scenes.
        matched: the query of each object, all objects counted through.
    """
    rows, cells, make_batch, first = [], [], batch_maker(model), 0
    for start in range(0, len(data), 25):
        batch = make_batch([data[i] for i in range(start, min(start + 25, len(data)))])
        maps = attention_maps(model, roles=("cross",), **batch.inputs())
        for image, target in enumerate(batch.targets):
            boxes, queries = target["boxes"], matched[first : first + len(target["boxes"])]
            first += len(boxes)
            looks = maps.cross[:, image, :, queries]  # i h n s
            xy = maps.xy[image].expand(len(looks), -1, -1)
            rows.append(share_inside(looks, xy, boxes.expand(len(looks), -1, -1)).mean(1))  # i n
            cells.append(cells_inside(xy[:1], boxes[None]).float().mean(-1)[0])
    inside = torch.cat(rows, 1).mean(1)
    return [round(float(share), 4) for share in inside], round(float(torch.cat(cells).mean()), 4)


def examine(model: DETR, film: dict[int, dict[str, Tensor]], data: MemoryDataset) -> list[dict[str, object]]:
    """What each copy of the weights does on the held-out scenes."""
    rows, before = [], None
    for step, weights in film.items():
        model.load_state_dict(weights)
        matched = matched_queries(*predict_layers(model, data))[-1]
        inside, uniform = attention_inside(model, data, matched)
        changed = None if before is None else round(float((matched != before).float().mean()), 4)
        rows.append({"step": step, "AP": round(evaluate(model, data)["AP"], 4), "inside": inside,
                     "uniform": uniform, "changed": changed})
        before = matched
    return rows


def make(name: str, steps: int) -> dict[str, object]:
    """Train one model, look at its copies, and return its row."""
    config = replace(RUNS[name], steps=steps)
    camera = WeightSnapshots(config.model, every=steps // COPIES)
    run = fit(replace(config, model=camera))
    film = {**camera.film, run.step: {key: value.clone() for key, value in run.model.state_dict().items()}}
    rows = examine(run.model, film, config.data.held_out())
    return {
        "model": name.rsplit(",", 1)[0], "seed": config.seed, "config": asdict(config), "steps": run.step,
        "seconds": round(run.seconds, 1), "milliseconds_per_step": round(1000 * run.seconds / run.step, 1),
        "parameters": sum(p.numel() for p in run.model.parameters()), "metrics": {"AP": rows[-1]["AP"]},
        "evaluations": rows,
    }


def main() -> None:
    """Make what is missing, one run after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=list(RUNS), choices=list(RUNS), metavar="NAME", help="only these")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run; another number is a trial")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and stop")
    args = parser.parse_args()
    one_thread()
    trial = Path(".cache") / f"why_slow_{args.steps}.json"
    file = ROOT / "results" / "why_slow.json" if args.steps == STEPS else trial
    rows = read_rows(file)
    missing = [name for name in args.names if name not in {row["name"] for row in rows}]
    if args.list:
        print("\n".join(f"{'missing' if name in missing else 'recorded':9} {name}" for name in args.names))
        return
    for name in missing:
        rows.append(named_row(name, partial(make, steps=args.steps)))
        write_rows(rows, list(RUNS), file, WHAT)
        print(f"{len(rows):3} of {len(RUNS)}  {name:24} {say_ap(rows[-1])}", flush=True)


if __name__ == "__main__":
    main()
