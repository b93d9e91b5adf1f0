"""The paper's ablations in small: one factor at a time around the base model, two seeds, equal steps.

    python results/ablations.py                    all that is missing
    python results/ablations.py --names "base, seed 0" "no encoder, seed 0"
    python results/ablations.py --list

Two runs go side by side, a core each, of about two minutes (three with more layers); memory stays under 3 GB.
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from side_by_side import ROOT, run_missing
from torch import Tensor, nn

from detr_nb.loading import ShapesData
from detr_nb.model import DETR, TinyModel, detr_tiny
from detr_nb.notation import Memory, Queries
from detr_nb.positions import LearnedPositions
from detr_nb.shapes import EASY
from detr_nb.training import TrainConfig, fit

STEPS, SEEDS = 600, (0, 1)


class Skip(nn.Module):
    """A residual step that leaves its sublayer out."""

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `x`."""
        return x


class WithoutPositions(nn.Module):
    """A memory whose positions are zero."""

    def forward(self, memory: Memory) -> Memory:
        """Everything else stays."""
        return memory._replace(pos=memory.pos * 0)


class Blind(nn.Module):
    """A part that gets the memory without positions; what it returns has them again.

    Args:
        part: maps a memory to a memory.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, memory: Memory) -> Memory:
        """The part's memory, with the positions that came in."""
        return self.part(WithoutPositions()(memory))._replace(pos=memory.pos)


class AddedOnce(nn.Module):
    """A memory whose positions are added to its content, once.

    Args:
        memory: makes a memory of images.
    """

    def __init__(self, memory: nn.Module):
        super().__init__()
        self.memory, self.backbone = memory, memory.backbone

    def forward(self, images: Tensor, pad: Tensor, cameras: Tensor | None = None) -> Memory:
        """The memory; its positions are zero."""
        made = self.memory(images, pad, cameras)
        return made._replace(x=made.x + made.pos, pos=made.pos * 0)


class QueriesAddedOnce(nn.Module):
    """Object queries whose vectors are their content at the start; they have no position.

    Args:
        queries: makes the object queries.
    """

    def __init__(self, queries: nn.Module):
        super().__init__()
        self.queries = queries

    def forward(self, memory: Memory, targets: object = None) -> Queries:
        """Content instead of position."""
        made = self.queries(memory, targets)
        return made._replace(content=made.pos, pos=made.pos * 0)


def without_feed_forward(model: DETR) -> None:
    """Take the feed-forward nets out of all layers."""
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.feed_step, layer.feed_forward = Skip(), nn.Identity()


def queries_at_the_input(model: DETR) -> None:
    """Give the queries their vectors once, not in every layer."""
    model.queries = QueriesAddedOnce(model.queries)


def positions_at_the_input(model: DETR) -> None:
    """Give cells and queries their positions once."""
    model.memory = AddedOnce(model.memory)
    queries_at_the_input(model)


def blind_encoder(model: DETR) -> None:
    """No positions in the encoder."""
    model.encoder = Blind(model.encoder)


def blind_decoder(model: DETR) -> None:
    """No positions of cells in the decoder."""
    model.encoder = nn.Sequential(model.encoder, WithoutPositions())


def no_positions(model: DETR) -> None:
    """No positions of cells at all; queries get theirs once."""
    model.encoder = nn.Sequential(WithoutPositions(), model.encoder)
    queries_at_the_input(model)


def learned_positions(model: DETR) -> None:
    """Learned positions instead of sines, in every layer."""
    model.memory.positions = LearnedPositions(model.memory.positions.d)


def only_the_last_layer(model: DETR) -> None:
    """No auxiliary losses."""
    model.aux_loss = False


@dataclass(frozen=True)
class Changed(TinyModel):
    """The small model after a change.

    Args:
        change: name of a function of this module that changes a model.
    """

    change: str = ""

    def build(self, num_classes: int) -> DETR:
        """Make it with fresh weights, and change it."""
        sizes = asdict(self)
        change = CHANGES[sizes.pop("change")]
        model = detr_tiny(num_classes=num_classes, **sizes)
        change(model)
        return model


CHANGES = {change.__name__: change for change in (
    without_feed_forward, positions_at_the_input, blind_encoder, blind_decoder, no_positions, learned_positions,
    only_the_last_layer,
)}
BASE = TrainConfig(data=ShapesData(EASY, cache=".cache/scenes"), steps=STEPS, evaluations=1, bf16=True,
                   progress=False)
FACTORS = {
    "base": BASE,
    "no encoder": replace(BASE, model=TinyModel(enc_layers=0)),
    "2 encoder layers": replace(BASE, model=TinyModel(enc_layers=2)),
    "3 encoder layers": replace(BASE, model=TinyModel(enc_layers=3)),
    "1 decoder layer": replace(BASE, model=TinyModel(dec_layers=1)),
    "2 decoder layers": replace(BASE, model=TinyModel(dec_layers=2)),
    "4 decoder layers": replace(BASE, model=TinyModel(dec_layers=4)),
    "6 decoder layers": replace(BASE, model=TinyModel(dec_layers=6)),
    "no feed-forward": replace(BASE, model=Changed(change="without_feed_forward")),
    "no positions of cells": replace(BASE, model=Changed(change="no_positions")),
    "positions at the input only": replace(BASE, model=Changed(change="positions_at_the_input")),
    "learned positions": replace(BASE, model=Changed(change="learned_positions")),
    "no positions in the encoder": replace(BASE, model=Changed(change="blind_encoder")),
    "no positions in the decoder": replace(BASE, model=Changed(change="blind_decoder")),
    "L1 without GIoU": replace(BASE, weight_giou=0, cost_giou=0),
    "GIoU without L1": replace(BASE, weight_bbox=0, cost_bbox=0),
    "no-object weighs 0.1": replace(BASE, no_object_weight=0.1),
    "no-object weighs 1": replace(BASE, no_object_weight=1.0),
    "no auxiliary losses": replace(BASE, model=Changed(change="only_the_last_layer")),
    "matching without class": replace(BASE, cost_class=0),
    "matching without L1": replace(BASE, cost_bbox=0),
    "matching without GIoU": replace(BASE, cost_giou=0),
    "norms after the sublayers": replace(BASE, model=TinyModel(pre_norm=False)),
    "temperature 10,000": replace(BASE, model=TinyModel(temperature=10000)),
}
RUNS = {f"{name}, seed {seed}": replace(config, seed=seed) for seed in SEEDS for name, config in FACTORS.items()}


def make(name: str) -> dict[str, object]:
    """Train one setting and return its row."""
    config = RUNS[name]
    run = fit(config)
    kinds = ("AP", "AP50", "AP75", "AP_small", "AP_medium")
    return {
        "factor": name.rsplit(",", 1)[0], "seed": config.seed, "config": asdict(config), "steps": run.step,
        "seconds": round(run.seconds, 1), "milliseconds_per_step": round(1000 * run.seconds / run.step, 1),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "metrics": {kind: round(run.metrics[kind], 4) for kind in kinds},
        "curve": [{key: round(row[key], 4) for key in ("step", "loss_ce", "loss_bbox", "loss_giou", "class_error")}
                  for row in run.history],
    }


if __name__ == "__main__":
    run_missing(list(RUNS), make, ROOT / "results" / "ablations.json",
                "one factor at a time around the small model, easy scenes, equal steps, two seeds", __doc__)
