"""Who belongs to whom: the assignment of targets to queries with the smallest total cost."""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detr_nb.boxes import cxcywh_to_xyxy, pairwise_giou
from detr_nb.notation import Number, Output, Target

class PaddedTargets(NamedTuple):
    """Targets of a batch in one block: rows beyond an image's own targets are zero.

    Attributes:
        labels: class ids.
        boxes: normalised cxcywh.
        counts: number of real targets of each image.
    """

    labels: Int[Tensor, "b t"]
    boxes: Float[Tensor, "b t 4"]
    counts: list[int]

def pad_targets(targets: Sequence[Target], boxes_like: Tensor) -> PaddedTargets:
    """Stack the targets of a batch, on the device and in the dtype of `boxes_like`."""
    device = boxes_like.device
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True).to(device, non_blocking=True)
    boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True).to(boxes_like, non_blocking=True)
    return PaddedTargets(labels, boxes, [len(t["labels"]) for t in targets])

def class_cost(out: Output, targets: PaddedTargets) -> Float[Tensor, "i b q t"]:
    """Minus the probability of the target's class (DETR, section 3.1): no logarithm, so it stays beside the boxes."""
    probability = out.logits.float().softmax(-1)
    i, _, q, _ = probability.shape
    return -probability.gather(-1, targets.labels[None, :, None].expand(i, -1, q, -1))

def l1_cost(out: Output, targets: PaddedTargets) -> Float[Tensor, "i b q t"]:
    """Sum of the four absolute differences of normalised cxcywh."""
    return torch.cdist(out.boxes.float(), targets.boxes.float(), p=1)

def giou_cost(out: Output, targets: PaddedTargets) -> Float[Tensor, "i b q t"]:
    """Minus the generalised IoU."""
    return -pairwise_giou(cxcywh_to_xyxy(out.boxes.float()), cxcywh_to_xyxy(targets.boxes.float()))

def explain_bad_cost(out: Output, targets: Sequence[Target]) -> str:
    """Say which prediction or target made the matching cost NaN, with the likely cause and the remedy."""
    for name, tensor in (("logits", out.logits), ("boxes", out.boxes)):
        bad = ~tensor.isfinite().flatten(2).all(2)  # i b
        if bad.any():
            layer, image = bad.nonzero()[0].tolist()
            return (f"predicted {name} are not finite (first at decoder layer {layer}, image {image} of the batch). "
                    "Likely causes: a learning rate that is too high, an overflow in half precision, "
                    "or images that were not normalised. Lower the rate, clip gradients, or train in float32")
    classes = out.logits.shape[-1] - 1
    for image, target in enumerate(targets):
        labels, boxes = target["labels"].tolist(), target["boxes"]
        name = target.get("image_id", f"number {image} of the batch")
        for row, label in enumerate(labels):
            if not 0 <= label < classes:
                return (f"image {name}: label {label} of target {row} is outside 0..{classes - 1}. Labels are contiguous "
                        f"ids from 0 and {classes} is no-object: map raw ids first, or build the model with more classes")
            if not boxes[row].isfinite().all() or (boxes[row, 2:] < 0).any():
                return (f"image {name}: box {boxes[row].tolist()} of target {row} is not a finite cxcywh box with a size "
                        "of at least 0. Convert it from corners or pixels, or drop it: run check_data on the dataset")
    return "the costs overflow: look for extremely large boxes or cost weights"

def valid_targets(targets: PaddedTargets, classes: int) -> Bool[Tensor, "b t"]:
    """True where the label is in range and the box is finite and not inside out."""
    in_range = (targets.labels >= 0) & (targets.labels < classes)
    return in_range & targets.boxes.isfinite().all(-1) & (targets.boxes[..., 2:] >= 0).all(-1)

CostTerm = Callable[[Output, PaddedTargets], Float[Tensor, "i b q t"]]
Matches = list[list[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]]]

class HungarianMatcher:
    """One-to-one matching for all decoder layers and images at once (DETR, section 3.1).

    Args:
        cost_class: weight of minus the probability of the target's class.
        cost_bbox: weight of the L1 distance of normalised boxes.
        cost_giou: weight of minus the generalised IoU.

    Raises:
        ValueError: if all weights are zero.
    """

    def __init__(self, cost_class: Number = 1.0, cost_bbox: Number = 5.0, cost_giou: Number = 2.0):
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("all three cost weights are 0, so every assignment costs the same: give at least one")
        self.terms: list[tuple[Number, CostTerm]] = [
            (cost_class, class_cost), (cost_bbox, l1_cost), (cost_giou, giou_cost)
        ]

    @torch.no_grad()
    def cost(self, out: Output, targets: PaddedTargets) -> Float[Tensor, "i b q t"]:
        """The weighted sum of the terms; NaN in the column of an invalid target."""
        classes = out.logits.shape[-1] - 1
        valid = valid_targets(targets, classes)
        safe = targets._replace(labels=targets.labels.clamp(0, classes))
        cost = sum(weight * term(out, safe) for weight, term in self.terms if weight)
        return cost.masked_fill(~valid[None, :, None], float("nan"))

    def __call__(self, out: Output, targets: Sequence[Target]) -> Matches:
        """Match every image of every layer.

        Args:
            out: predictions of all decoder layers.
            targets: one an image.

        Returns:
            For each layer, for each image, the ids of matched queries (ascending) and of their targets, on the CPU;
            min(queries, targets) pairs an image.

        Raises:
            ValueError: if a prediction or target makes the cost NaN, naming which and the likely cause.
        """
        padded = pad_targets(targets, out.boxes)
        cost = self.cost(out, padded).cpu().numpy()  # the only transfer to the host
        if not np.isfinite(cost).all():
            raise ValueError(explain_bad_cost(out, targets))
        return [[assign(image[:, :n]) for image, n in zip(layer, padded.counts, strict=True)] for layer in cost]

def assign(cost: np.ndarray) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """The cheapest one-to-one assignment of columns to rows of a cost matrix."""
    rows, columns = linear_sum_assignment(cost)
    return torch.from_numpy(rows), torch.from_numpy(columns)
