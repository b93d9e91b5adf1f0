"""Train the small detector with other queries, or with another matching, one setting a run.

    python results/query_laboratory.py                                all that is missing
    python results/query_laboratory.py --names "5 queries" "learned content"
    python results/query_laboratory.py --list

Each setting makes the same number of steps on the default scenes. Two go side by side, a core each, for two to four
minutes; memory stays under 3 GB.
"""
from dataclasses import asdict, dataclass, replace

from side_by_side import ROOT, run_missing
from torch import nn

from detr_nb.evaluation import coco_evaluate
from detr_nb.explorables import record_training
from detr_nb.insight import (
    WeightSnapshots,
    count_repeats,
    matched_queries,
    non_max_suppression,
    predict_layers,
)
from detr_nb.loading import MemoryDataset, ShapesData
from detr_nb.model import DETR, ObjectQueries, TinyModel, detr_tiny, postprocess
from detr_nb.notation import Memory, Queries
from detr_nb.shapes import DEFAULT
from detr_nb.training import TrainConfig, fit

STEPS, COPIES = 600, 20
SCENE, SHOWN = 13, "16 queries"  # what appendix 91 shows


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
BASE = TrainConfig(data=DATA, model=TinyModel(), steps=STEPS, evaluations=1, bf16=True, seed=0, progress=False)
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
        found = postprocess(out.layer(layer), [target["size"] for target in targets])
        shares = postprocess(out.layer(layer), [(1, 1)] * len(targets))
        plain = coco_evaluate(targets, found, data.names, data.category_ids)
        nms = coco_evaluate(targets, [non_max_suppression(row) for row in found], data.names, data.category_ids)
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


def make(name: str) -> dict[str, object]:
    """Train one setting and return its row."""
    config = SETTINGS[name]
    camera = WeightSnapshots(config.model, every=config.steps // COPIES)
    run = fit(replace(config, model=camera))
    val = config.data.series(config.data.val_images, seed=2)
    film = {**camera.film, run.step: {key: value.clone() for key, value in run.model.state_dict().items()}}
    few = MemoryDataset(val.images[:100], val.targets[:100], val.names, val.category_ids)
    return {
        "seed": config.seed, "config": asdict(config), "steps": run.step, "seconds": round(run.seconds, 1),
        "milliseconds_per_step": round(1000 * run.seconds / run.step, 1), "metrics": judge(run.model, val),
        "instability": instability(run.model, film, few),
        **({"film": record_training(run.model, film, *val[SCENE])} if name == SHOWN else {}),
    }


if __name__ == "__main__":
    run_missing(list(SETTINGS), make, ROOT / "results" / "query_laboratory.json",
                "other numbers and kinds of queries, and other matchings, at equal steps; default scenes, one seed",
                __doc__)
