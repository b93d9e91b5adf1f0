"""Measure what sampling costs beside Hugging Face's python path and beside dense attention, with nothing else running:
some five minutes.

    python results/sampling_speed.py              writes results/sampling_speed.json
    python results/sampling_speed.py --rounds 1   a trial, which writes nothing

Four levels of a photograph of 800 x 1066 pixels, eight heads of 32 numbers, four points on each level: forward and
backward of the operator alone, in the encoder, where every cell asks, and in the decoder, where 300 queries do. A round
calls all ways in turn. Memory is the growth of a fresh process in one call, once for each way. Then the attention of
cells to cells as a whole (its linear maps included) on square grids that grow: dense, and with four sampled points.
"""
import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_nb.family.deformable import SampledCellAttention, sample, sample_grids
from detr_nb.files import json_text, replacing
from detr_nb.measuring import (
    describe_machine,
    in_fresh_process,
    interleaved,
    peak_memory_mb,
    rows_of,
    table,
)
from detr_nb.notation import Memory
from detr_nb.transformer import CellAttention

FILE = Path(__file__).resolve().with_suffix(".json")
WHAT = "seconds and memory of forward and backward of sampling: beside Hugging Face's, and beside dense attention"
SIDES = (16, 23, 32, 45, 64, 91)
SHAPES = tuple((math.ceil(800 / stride), math.ceil(1066 / stride)) for stride in (8, 16, 32, 64))
CELLS = sum(rows * columns for rows, columns in SHAPES)
QUERIES = {"encoder": CELLS, "decoder": 300}


def hugging_face(values: Tensor, shapes: tuple, points: Tensor, weights: Tensor) -> Tensor:
    """Their python path, which runs wherever no kernel is compiled."""
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    return MultiScaleDeformableAttention()(values, torch.tensor(shapes), list(shapes), None, points, weights, 64)


WAYS = {"Hugging Face": hugging_face, "ours": sample, "grid by grid": sample_grids}


def inputs(queries: int) -> list[Tensor]:
    """Values, points within a few cells of the queries' places, and weights."""
    draw = torch.Generator().manual_seed(0)
    sides = torch.tensor([[columns, rows] for rows, columns in SHAPES])[:, None]
    places = torch.rand(1, queries, 1, 1, 1, 2, generator=draw)
    if queries == CELLS:  # every cell at its own place
        grids = [torch.cartesian_prod((torch.arange(y) + 0.5) / y, (torch.arange(x) + 0.5) / x) for y, x in SHAPES]
        places = torch.cat(grids).flip(-1)[None, :, None, None, None]
    points = places + 2 * torch.randn(1, queries, 8, len(SHAPES), 4, 2, generator=draw) / sides
    weights = torch.randn(1, queries, 8, 16, generator=draw).softmax(-1).unflatten(-1, (4, 4))
    return [part.requires_grad_() for part in (torch.randn(1, CELLS, 8, 32, generator=draw), points, weights)]


def both_passes(way: Callable[..., Tensor], given: list[Tensor]) -> None:
    """Forward and backward, with gradients of all three."""
    torch.autograd.grad(way(given[0], SHAPES, *given[1:]).sum(), given)


def memory(name: str, queries: int) -> float:
    """Megabytes by which this process grows in one call; everything is imported before."""
    small = [part[:, :8].detach().requires_grad_() if i else part for i, part in enumerate(inputs(8))]
    both_passes(WAYS[name], small)
    given = inputs(queries)
    before = peak_memory_mb()
    both_passes(WAYS[name], given)
    return peak_memory_mb() - before


def square(side: int) -> Memory:
    """A memory of one level, and no padding."""
    draw = torch.Generator().manual_seed(0)
    middles = (torch.arange(side) + 0.5) / side
    return Memory(
        x=torch.randn(1, side**2, 256, generator=draw), pos=torch.randn(1, side**2, 256, generator=draw),
        pad=torch.zeros(1, side**2, dtype=torch.bool), xy=torch.cartesian_prod(middles, middles).flip(-1)[None],
        shapes=((side, side),), features=(), valid=torch.ones(1, 1, 2),
    )


def attend(attention: nn.Module, memory: Memory) -> None:
    """Forward and backward of the attention of cells to cells."""
    attention(memory.x, memory).sum().backward()


def measure_growth(side: int, rounds: int) -> list[dict[str, object]]:
    """Rows of one grid."""
    torch.manual_seed(0)
    kinds = {"dense": CellAttention(256, 8), "sampled": SampledCellAttention(256, 8, 1, 4)}
    ways = {name: partial(attend, attention, square(side)) for name, attention in kinds.items()}
    rows = rows_of(f"attention of {side} x {side} cells", interleaved(ways, rounds))
    print(table(rows), flush=True)
    return [asdict(row) | {"cells": side**2} for row in rows]


def measure_memory() -> list[dict[str, object]]:
    """Rows of both parts. They come first: a process starts with the peak of the one that starts it."""
    rows = []
    for place, queries in QUERIES.items():
        grown = {name: [in_fresh_process(memory, name, queries)] for name in WAYS}
        rows += rows_of(f"{place}, memory", grown, "MB")
    print(table(rows), flush=True)
    return [asdict(row) for row in rows]


def measure(place: str, rounds: int) -> list[dict[str, object]]:
    """Rows of one part of a detector."""
    given = inputs(QUERIES[place])
    ways = {name: partial(both_passes, way, given) for name, way in WAYS.items()}
    rows = rows_of(f"{place}, forward and backward", interleaved(ways, rounds))
    print(table(rows), flush=True)
    return [asdict(row) for row in rows]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="a trial of so many rounds")
    trial = parser.parse_args().rounds
    rows = measure_memory()
    rows += [row for place in QUERIES for row in measure(place, trial or 7)]
    rows += [row for side in SIDES for row in measure_growth(side, trial or 7)]
    if trial:
        return
    record = {"what": WHAT, "command": "python results/sampling_speed.py", "date": time.strftime("%Y-%m-%d"),
              "machine": describe_machine(), "rows": rows}
    with replacing(FILE) as place:
        place.write(json_text(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
