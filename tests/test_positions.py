"""Positions against Hugging Face's DETR, against plain loops, and as properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from detr_nb.positions import (
    LearnedPositions,
    SinePositions,
    grid_angles,
    grid_coordinates,
    sine_embedding,
)

SIDES = st.integers(1, 12)
WIDTHS = st.integers(1, 12).map(lambda n: 4 * n)


@st.composite
def paddings(draw) -> torch.Tensor:
    """Batches of rectangular images of different sizes in one grid, as `data` makes them."""
    sizes = draw(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3))
    pad = torch.ones(len(sizes), max(h for h, _ in sizes), max(w for _, w in sizes), dtype=torch.bool)
    for image, (height, width) in zip(pad, sizes, strict=True):
        image[:height, :width] = False
    return pad


def official(pad: torch.Tensor, d: int, temperature: float) -> torch.Tensor:
    """DETR's formula cell by cell in double precision, from the facts: nothing is shared with the library."""
    result = torch.zeros(*pad.shape, d, dtype=torch.float64)
    half = d // 2
    for b, y, x in (~torch.zeros_like(pad)).nonzero().tolist():
        places = (
            (~pad[b, : y + 1, x]).sum().item() / ((~pad[b, :, x]).sum().item() + 1e-6),
            (~pad[b, y, : x + 1]).sum().item() / ((~pad[b, y]).sum().item() + 1e-6),
        )
        for which, place in enumerate(places):  # y first
            for channel in range(half):
                angle = 2 * math.pi * place / temperature ** (2 * (channel // 2) / half)
                wave = math.cos(angle) if channel % 2 else math.sin(angle)
                result[b, y, x, which * half + channel] = wave
    return result


@given(paddings(), st.sampled_from([4, 8, 20]), st.sampled_from([20, 10000]))
def test_equals_the_formula_cell_by_cell(pad, d, temperature):
    assert_close(SinePositions(d, temperature)(pad).double(), official(pad, d, temperature), atol=2e-6, rtol=0)


@pytest.mark.parametrize("temperature", [20, 10000])
@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("sizes", [[(6, 8), (4, 5)], [(25, 34), (19, 34), (25, 7)], [(1, 1)]])
def test_equals_hugging_face(sizes, d, temperature):
    from transformers.models.detr import modeling_detr as detr

    pad = torch.ones(len(sizes), max(h for h, _ in sizes), max(w for _, w in sizes), dtype=torch.bool)
    for image, (height, width) in zip(pad, sizes, strict=True):
        image[:height, :width] = False
    peer = detr.DetrSinePositionEmbedding(d // 2, temperature=temperature, normalize=True)
    theirs = peer((len(sizes), d, *pad.shape[1:]), torch.device("cpu"), torch.float32, mask=~pad)  # b d y x
    assert_close(SinePositions(d, temperature)(pad), theirs.permute(0, 2, 3, 1), atol=5e-6, rtol=0)


def test_learned_equals_hugging_face():
    from transformers.models.detr import modeling_detr as detr

    ours, peer = LearnedPositions(32), detr.DetrLearnedPositionEmbedding(16)
    peer.row_embeddings.load_state_dict(ours.row.state_dict())
    peer.column_embeddings.load_state_dict(ours.col.state_dict())
    theirs = peer((2, 32, 6, 8), torch.device("cpu"), torch.float32)
    assert_close(ours(torch.zeros(2, 6, 8, dtype=torch.bool)), theirs.permute(0, 2, 3, 1))


PLACES = st.floats(-50, 50)


@given(PLACES, PLACES, PLACES, st.integers(1, 16), st.sampled_from([1, 20, 10000.0]))
def test_similarity_depends_on_the_distance_only(a, b, shift, pairs, temperature):
    places = torch.tensor([a, b, a + shift, b + shift], dtype=torch.float64)
    e = sine_embedding(places, 2 * pairs, temperature)
    assert e.dtype == torch.float64
    assert_close(e[0] @ e[1], e[2] @ e[3], atol=1e-9, rtol=0)
    assert_close(e.square().sum(-1), torch.full((4,), float(pairs), dtype=torch.float64))


@given(paddings(), WIDTHS)
def test_padding_around_an_image_changes_nothing(pad, d):
    together = SinePositions(d)(pad)
    assert together.isfinite().all() and together.abs().max() <= 1
    for image, embedded in zip(pad, together, strict=True):
        height, width = int((~image).any(1).sum()), int((~image).any(0).sum())
        alone = SinePositions(d)(torch.zeros(1, height, width, dtype=torch.bool))
        assert_close(embedded[:height, :width], alone[0])


@given(paddings())
def test_coordinates_count_and_angles_end_at_a_full_turn(pad):
    count, angles = grid_coordinates(pad), grid_angles(pad)
    for image, n, angle in zip(pad, count, angles, strict=True):
        for y, x in (~image).nonzero().tolist():
            assert n[y, x].tolist() == [x + 1, y + 1]
        height, width = int((~image).any(1).sum()), int((~image).any(0).sum())
        assert_close(angle[height - 1, width - 1], torch.full((2,), 2 * math.pi), atol=1e-4, rtol=0)
    assert (angles >= 0).all() and (angles <= 2 * math.pi + 1e-5).all()


@pytest.mark.parametrize("temperature", [20, 10000])
def test_no_two_cells_of_a_large_grid_share_an_address(temperature):
    addresses = SinePositions(64, temperature)(torch.zeros(1, 40, 50, dtype=torch.bool)).flatten(0, 2)
    assert torch.pdist(addresses).min() > 0.05


def test_all_padding_is_finite():
    assert SinePositions(8)(torch.ones(2, 3, 4, dtype=torch.bool)).isfinite().all()


def test_default_dtype_and_empty_batch():
    assert SinePositions(8)(torch.zeros(0, 3, 4, dtype=torch.bool)).shape == (0, 3, 4, 8)
    assert SinePositions(8)(torch.zeros(1, 3, 4, dtype=torch.bool)).dtype == torch.get_default_dtype()
    assert not list(SinePositions(8).parameters())


def test_everything_is_made_on_the_device_of_the_mask():
    pad = torch.zeros(2, 3, 4, dtype=torch.bool, device="meta")  # fails if any part is made elsewhere
    assert SinePositions(8)(pad).device.type == "meta"
    assert LearnedPositions(8).to("meta")(pad).device.type == "meta"


def test_learned_order_is_columns_then_rows_and_both_train():
    learned = LearnedPositions(8, cells=7)
    out = learned(torch.zeros(1, 5, 7, dtype=torch.bool))
    assert_close(out[0, 4, 6, :4], learned.col.weight[6])
    assert_close(out[0, 4, 6, 4:], learned.row.weight[4])
    out.sum().backward()
    assert_close(learned.col.weight.grad, torch.full((7, 4), 5.0))  # each column stands in five rows
    assert_close(learned.row.weight.grad[:5], torch.full((5, 4), 7.0))
    assert not learned.row.weight.grad[5:].any()


@pytest.mark.parametrize("build", [lambda: SinePositions(6), lambda: LearnedPositions(7),
                                   lambda: sine_embedding(torch.zeros(2), 3)])
def test_widths_that_cannot_be_split_are_refused(build):
    with pytest.raises(ValueError, match="even|multiple of 4"):
        build()


@pytest.mark.parametrize("shape", [(1, 8, 3), (1, 3, 8)])
def test_learned_refuses_more_cells_than_it_knows(shape):
    with pytest.raises(ValueError, match="cells=8"):
        LearnedPositions(4, cells=7)(torch.zeros(shape, dtype=torch.bool))
