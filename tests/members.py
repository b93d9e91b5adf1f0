"""Two detectors that exist in tests only: between them they use every seam that DETR leaves alone.

`Everything` has sigmoid scores, boxes that count from references (refined layer by layer, looking forward twice),
queries chosen from the image, known boxes to repair in training, and a second set of queries to which each object
belongs several times. `Space` sees a scene by two cameras and answers with boxes of ten numbers. Neither is a good
detector, and neither is a chapter: they prove that one fits in without a change elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import grid_sample, one_hot
from torchvision.ops import sigmoid_focal_loss

from detr_nb.losses import SetCriterion, authors_criterion
from detr_nb.matcher import PaddedTargets
from detr_nb.model import MLP, DETRConfig, Draws, Scores, SigmoidScores
from detr_nb.notation import (
    Memory,
    Number,
    Output,
    Prediction,
    Queries,
    QueryGroup,
    Target,
)
from detr_nb.positions import sine_embedding
from detr_nb.transformer import Decoder, DecoderLayer, QueryPosition


def inverse_sigmoid(share: Tensor) -> Tensor:
    """The number whose sigmoid is `share`."""
    return share.logit(eps=1e-3)


# --- classes judged one by one ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FocalClasses:
    """Focal loss, divided by objects.

    Args:
        matched_only: queries without an object do not count.
    """

    matched_only: bool = False
    spare: ClassVar[int] = 0
    counts_queries: ClassVar[bool] = False

    def normaliser(self, counts: Sequence[int], queries: int) -> Number:
        """Number of objects."""
        return sum(counts)

    def loss(self, logits: Float[Tensor, "i b q c"], wanted: Int[Tensor, "i b q"], by: Number) -> Float[Tensor, " i"]:
        """Summed over queries and classes."""
        truth = one_hot(wanted, logits.shape[-1] + 1)[..., :-1].to(logits)
        loss = sigmoid_focal_loss(logits, truth).sum(-1)
        counted = truth.sum(-1) if self.matched_only else torch.ones_like(loss)
        return (counted * loss).sum((1, 2)) / max(by, 1)

    def claimed(self, logits: Float[Tensor, "i b q c"]) -> Bool[Tensor, "i b q"]:
        """True where some class is likelier than not."""
        return (logits > 0).any(-1)


def focal_cost(out: Output, targets: PaddedTargets) -> Float[Tensor, "i b q t"]:
    """What the loss would lose if the class were said more firmly."""
    p = out.logits.float().sigmoid()
    cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    i, _, q, _ = p.shape
    return cost.gather(-1, targets.labels[None, :, None].expand(i, -1, q, -1))


def one_class(targets: Sequence[Target]) -> list[Target]:
    """The same objects, all of class 0: proposals are not asked for a class."""
    return [Target(**{**target, "labels": torch.zeros_like(target["labels"])}) for target in targets]


def three_times(targets: Sequence[Target]) -> list[Target]:
    """Each object listed three times."""
    return [Target(labels=target["labels"].repeat(3), boxes=target["boxes"].repeat(3, 1)) for target in targets]


# --- queries ------------------------------------------------------------------------------------------------------
class Proposals(nn.Module):
    """A class score for all classes and a box for every cell of the memory."""

    def __init__(self, d: int, columns: int):
        super().__init__()
        self.classes, self.boxes = nn.Linear(d, columns), MLP(d, d, 4)

    def forward(self, memory: Memory) -> Prediction:
        """Boxes count from the cell's centre and a fifth of the picture; padding is never chosen."""
        anchors = inverse_sigmoid(torch.cat((memory.xy, torch.full_like(memory.xy, 0.2)), -1))
        logits = self.classes(memory.x).masked_fill(memory.pad[..., None], -1e4)
        return Prediction(logits, (anchors + self.boxes(memory.x)).sigmoid())


class EverythingQueries(nn.Module):
    """Boxes of the best cells with learned contents; in training, two groups beside them.

    Args:
        count: queries that answer.
        many: queries of the second set.
        d: model width.
        columns: of the class scores.
    """

    copies = 2

    def __init__(self, count: int, many: int, d: int, columns: int):
        super().__init__()
        self.count, self.many, self.draws = count, many, Draws()
        self.propose, self.content = Proposals(d, columns), nn.Embedding(count + many, d)
        self.labels = nn.Embedding(columns + 1, d)

    def class_maps(self) -> list[nn.Module]:
        """Proposals have classes, and labels of known boxes have a vector each."""
        return [self.propose.classes, self.labels]

    def noised(self, target: Target, slots: int) -> tuple[Tensor, Tensor]:
        """Contents and boxes of an image's known objects: some classes replaced, boxes moved; unused slots are zero."""
        boxes, n = target["boxes"], len(target["labels"])
        other = self.draws.integers("labels", self.labels.num_embeddings - 1, (n,), boxes)
        wrong = self.draws.uniform("wrong", (n,), boxes) < 0.2
        move = 2 * self.draws.uniform("boxes", (n, 4), boxes) - 1
        sides = torch.cat((boxes[:, 2:] / 2, boxes[:, 2:]), 1)
        content = self.labels(torch.where(wrong, other, target["labels"]))
        moved = (boxes + 0.4 * move * sides).clamp(1e-3, 1 - 1e-3)
        filled = torch.full((slots, 4), 0.5).to(moved)
        filled[:n] = moved
        return torch.cat((content, content.new_zeros(slots - n, content.shape[1]))), filled

    def known(self, targets: Sequence[Target], like: Tensor) -> tuple[Tensor, Tensor, QueryGroup]:
        """The group of known boxes: contents, boxes, and who belongs to whom."""
        targets = [{name: target[name].to(like.device) for name in ("labels", "boxes")} for target in targets]
        slots = max(1, *(len(target["labels"]) for target in targets))
        rows = [[self.noised(target, slots) for _ in range(self.copies)] for target in targets]
        content, boxes = (torch.stack([torch.cat([row[i] for row in image]) for image in rows]) for i in (0, 1))
        pairs = []
        for target in targets:
            ids = torch.arange(len(target["labels"]))
            pairs.append((torch.cat([ids + copy * slots for copy in range(self.copies)]), ids.repeat(self.copies)))
        content = content + 0 * self.labels.weight.sum()  # every process uses the table, objects or not
        return content, boxes, QueryGroup("known", slice(0, self.copies * slots), pairs, self.copies)

    def forward(self, memory: Memory, targets: Sequence[Target] | None = None) -> Queries:
        """The best cells become queries; with targets, those of training join them."""
        found = self.propose(memory)
        best = found.logits[..., 0].topk(self.count + (self.many if targets is not None else 0)).indices
        ref = found.boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        content = self.content.weight[: best.shape[1]].expand(memory.x.shape[0], -1, -1)
        if targets is None:
            return Queries(content, ref=ref, proposals=found)
        noise, boxes, known = self.known(targets, memory.x)
        sizes = (noise.shape[1], self.count, self.many)
        member = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
        hidden = (member[:, None] != member) & ~((member[:, None] == 0) & (member == 1))  # known ones see the answering
        mask = torch.zeros(1, 1, sum(sizes), sum(sizes)).masked_fill(hidden, -math.inf).to(memory.x)
        groups = (known, QueryGroup("many", slice(sum(sizes[:2]), sum(sizes))))
        return Queries(torch.cat((noise, content), 1), None, torch.cat((boxes, ref), 1), mask, groups, found)


class BoxPosition(nn.Module):
    """A query stands at its reference box."""

    def __init__(self, d: int):
        super().__init__()
        self.d, self.map = d, MLP(2 * d, d, d)

    def forward(self, layer: int, content: Tensor, pos: None, ref: Tensor, memory: Memory) -> QueryPosition:
        """The sines of the four numbers, through a small network."""
        place = self.map(sine_embedding(2 * math.pi * ref, self.d // 2).flatten(-2))
        return QueryPosition(place, place)


class CountingHead(nn.Module):
    """Classes, and boxes that count from a base."""

    def __init__(self, d: int, columns: int):
        super().__init__()
        self.classes, self.boxes = nn.Linear(d, columns), MLP(d, d, 4)

    def forward(self, layer: int, content: Tensor, base: Tensor) -> Prediction:
        """Move the base."""
        return Prediction(self.classes(content), (inverse_sigmoid(base) + self.boxes(content)).sigmoid())

    def refine(self, layer: int, content: Tensor, prediction: Prediction, ref: Tensor) -> tuple[Tensor, Tensor]:
        """The next layer looks at the new box; the next head counts from it with its gradient."""
        return prediction.boxes.detach(), prediction.boxes

    def class_maps(self) -> list[nn.Module]:
        """The map of classes."""
        return [self.classes]

    def outputs(self) -> list[nn.Linear]:
        """The last maps."""
        return [self.classes, self.boxes[-1]]


@dataclass(frozen=True)
class Everything(DETRConfig):
    """A detector that uses every seam in two dimensions.

    Args:
        many: queries of the second set.
    """

    many: int = 6

    def queries(self, columns: int, memory: nn.Module) -> nn.Module:
        """Chosen from the image."""
        return EverythingQueries(self.num_queries, self.many, self.hidden_dim, columns)

    def decoder(self, columns: int, memory: nn.Module, queries: nn.Module) -> nn.Module:
        """Layers that know a reference."""
        layers = [DecoderLayer(*self.layer_sizes()) for _ in range(self.dec_layers)]
        head = CountingHead(self.hidden_dim, columns)
        return Decoder(layers, nn.LayerNorm(self.hidden_dim), head, BoxPosition(self.hidden_dim))

    def scores(self) -> Scores:
        """Classes one by one."""
        return SigmoidScores(top=10)


@authors_criterion.register
def _(config: Everything, model: nn.Module, no_object_weight: Number = 0, **weights: Number) -> SetCriterion:
    def part(matched_only: bool = False, **options: object) -> SetCriterion:
        focal = {"classes": FocalClasses(matched_only), "class_term": focal_cost, "boxes": model.boxes}
        return SetCriterion(model.num_classes, **{"cost_class": 2, **weights}, **focal, **options)

    extra = {"proposals": part(prepare=one_class), "known": part(True), "many": part(prepare=three_times)}
    return part(dec_layers=config.dec_layers, extra=extra)


# --- space --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SpaceBoxes:
    """Ten numbers: centre x, y and log sides w, l; centre z and log height; sine and cosine of the heading; velocity.

    A target's boxes have nine: centre, sides, heading, velocity, in metres and radians.

    Args:
        reach: boxes further from the origin than this, along any axis, are not reported.
    """

    reach: float = 10.0
    proper: ClassVar[str] = "a finite box of ten numbers"

    def encode(self, target: Target) -> Float[Tensor, "t 10"]:
        """Nine numbers become ten."""
        x, y, z, w, l, h, turn, vx, vy = target["boxes"].unbind(-1)
        return torch.stack((x, y, w.log(), l.log(), z, h.log(), turn.sin(), turn.cos(), vx, vy), -1)

    def valid(self, boxes: Float[Tensor, "*n 10"]) -> Bool[Tensor, "*n"]:
        """Any finite numbers will do."""
        return boxes.isfinite().all(-1)

    def costs(self, boxes: Float[Tensor, "i b q 10"], truth: Float[Tensor, "b t 10"]) -> dict[str, Tensor]:
        """L1 alone."""
        return {"bbox": torch.cdist(boxes, truth, p=1)}

    def losses(self, boxes: Float[Tensor, "i m 10"], truth: Float[Tensor, "i m 10"]) -> dict[str, Tensor]:
        """L1 alone, summed over pairs."""
        return {"bbox": (boxes - truth).abs().sum((1, 2))}

    def decode(self, boxes: Float[Tensor, "n 10"], size: tuple[int, int]) -> tuple[Tensor, Bool[Tensor, " n"]]:
        """Ten numbers become nine, whatever the size of the pictures."""
        x, y, w, l, z, h, sine, cosine, vx, vy = boxes.unbind(-1)
        plain = torch.stack((x, y, z, w.exp(), l.exp(), h.exp(), torch.atan2(sine, cosine), vx, vy), -1)
        return plain, (plain[:, :3].abs() <= self.reach).all(-1)


class PointQueries(nn.Module):
    """Learned contents, positions and points, the points as shares of the space."""

    def __init__(self, count: int, d: int):
        super().__init__()
        self.content, self.pos, self.points = nn.Embedding(count, d), nn.Embedding(count, d), nn.Embedding(count, 3)

    def class_maps(self) -> list[nn.Module]:
        """None."""
        return []

    def forward(self, memory: Memory, targets: Sequence[Target] | None = None) -> Queries:
        """The same for every scene."""
        rows = (table.weight.expand(memory.x.shape[0], -1, -1) for table in (self.content, self.pos, self.points))
        content, pos, points = rows
        return Queries(content, pos, points.sigmoid())


class ProjectedAttention(nn.Module):
    """A query's point, seen by every camera: what the grids hold there, weighted.

    Args:
        d: model width.
        reach: half the side of the space, metres.
    """

    def __init__(self, d: int, reach: float):
        super().__init__()
        self.reach, self.weight, self.out = reach, nn.Linear(d, 1), nn.Linear(d, d)

    def look(self, content: Tensor, where: QueryPosition, ref: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Points (b q v l 2) as shares of each padded picture, and weights (b q v l), 0 where nothing is seen."""
        metres = (ref - 0.5) * 2 * self.reach
        points = torch.cat((metres, torch.ones_like(metres[..., :1])), -1)
        u, v, depth, _ = torch.einsum("bvij,bqj->bqvi", memory.cameras, points).unbind(-1)
        shares = torch.stack((u, v), -1) / depth[..., None].clamp(min=1e-3)
        seen = (depth > 1e-3) & ((shares > 0) & (shares < 1)).all(-1)  # b q v
        weights = self.weight(content + where.cross).sigmoid() * seen
        return shares[..., None, :], weights[..., None]

    def forward(self, content: Tensor, where: QueryPosition, ref: Tensor, memory: Memory) -> Tensor:
        """The weighted sum over views."""
        points, weights = self.look(content, where, ref, memory)
        (grid,) = memory.masked().grids()  # b_v d y x
        places = (2 * points[..., 0, :] - 1).transpose(1, 2).flatten(0, 1)[:, :, None]
        found = grid_sample(grid, places, align_corners=False)[..., 0]  # b_v d q
        views = found.unflatten(0, (len(content), -1)).permute(0, 3, 1, 2)  # b q v d
        return self.out((views * weights).sum(2))


class PointHead(CountingHead):
    """Boxes of ten numbers, whose centres count from a point in shares of the space.

    Args:
        d: model width.
        columns: of the class scores.
        reach: half the side of the space, metres.
    """

    def __init__(self, d: int, columns: int, reach: float):
        super().__init__(d, columns)
        self.boxes, self.reach = MLP(d, d, 10), reach

    def forward(self, layer: int, content: Tensor, base: Tensor) -> Prediction:
        """Centres in metres; everything else as it comes."""
        numbers = self.boxes(content)
        moved = (inverse_sigmoid(base) + numbers[..., [0, 1, 4]]).sigmoid()
        x, y, z = ((moved - 0.5) * 2 * self.reach).unbind(-1)
        rest = numbers.unbind(-1)
        return Prediction(self.classes(content), torch.stack((x, y, *rest[2:4], z, *rest[5:]), -1))

    def refine(self, layer: int, content: Tensor, prediction: Prediction, ref: Tensor) -> tuple[Tensor, Tensor]:
        """Metres become shares again."""
        shares = (prediction.boxes[..., [0, 1, 4]] / (2 * self.reach) + 0.5).detach()
        return shares, shares


@dataclass(frozen=True)
class Space(DETRConfig):
    """A detector of boxes in metres."""

    def queries(self, columns: int, memory: nn.Module) -> nn.Module:
        """Points."""
        return PointQueries(self.num_queries, self.hidden_dim)

    def decoder(self, columns: int, memory: nn.Module, queries: nn.Module) -> nn.Module:
        """Layers that project; nothing is dropped behind the projection."""
        sizes, reach = self.layer_sizes(), self.boxes().reach
        layers = [DecoderLayer(*sizes, cross=ProjectedAttention(self.hidden_dim, reach), cross_dropout=0)
                  for _ in range(self.dec_layers)]
        return Decoder(layers, nn.LayerNorm(self.hidden_dim), PointHead(self.hidden_dim, columns, reach))

    def scores(self) -> Scores:
        """Classes one by one."""
        return SigmoidScores(top=6)

    def boxes(self) -> SpaceBoxes:
        """In metres."""
        return SpaceBoxes()


@authors_criterion.register
def _(config: Space, model: nn.Module, **weights: Number) -> SetCriterion:
    weights = {"cost_class": 2, "weight_ce": 2, "cost_bbox": 0.25, "weight_bbox": 0.25, "cost_giou": 0, **weights}
    return SetCriterion(model.num_classes, **weights, classes=FocalClasses(), class_term=focal_cost, boxes=model.boxes)
