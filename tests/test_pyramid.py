"""Tokens of several levels: beside one level, and on pictures smaller than a cell."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detr_nb.backbone import ResNet, TinyBackbone
from detr_nb.family.pyramid import CentrePositions, LevelNorm, PyramidMemory
from detr_nb.model import SingleLevelMemory
from detr_nb.notation import Memory


def pyramid(levels: int = 4, maps: int = 3, d: int = 32, backbone: nn.Module | None = None) -> PyramidMemory:
    """A small one in evaluation mode, always the same."""
    torch.manual_seed(0)
    backbone = backbone or TinyBackbone((8, 12, 16), (4, 8, 16))
    return PyramidMemory(backbone, CentrePositions(d), d, levels, maps).eval()


def pictures(*sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures of these heights and widths, and their padding."""
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    images = torch.randn(len(sizes), 3, height, width, generator=torch.Generator().manual_seed(1))
    pad = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for row, (y, x) in zip(pad, sizes, strict=True):
        row[:y, :x] = False
    return images.masked_fill(pad[:, None], 0), pad


def levels_of(memory: Memory) -> list[Memory]:
    """Each level as a memory of its own."""
    sizes = [rows * columns for rows, columns in memory.shapes]
    cut = {name: getattr(memory, name).split(sizes, 1) for name in ("x", "pos", "pad", "xy")}
    return [memory._replace(**{name: parts[i] for name, parts in cut.items()}, shapes=(memory.shapes[i],),
                            valid=memory.valid[:, i, None], cells=memory.cells[:, i, None])
            for i in range(len(sizes))]


@pytest.mark.parametrize(("levels", "maps", "strides"), [
    (1, 3, (16,)), (2, 3, (8, 16)), (3, 3, (4, 8, 16)), (4, 3, (4, 8, 16, 32)), (4, 1, (16, 32, 64, 128)),
    (5, 2, (8, 16, 32, 64, 128)), (4, 9, (4, 8, 16, 32)),
])
def test_levels_come_from_the_backbone_and_then_from_convolutions(levels, maps, strides):
    model, (images, pad) = pyramid(levels, maps), pictures((64, 96), (40, 64))
    memory = model(images, pad)
    assert model.strides == strides
    assert memory.shapes == tuple((-(-64 // stride), -(-96 // stride)) for stride in strides)
    assert memory.x.shape == (2, sum(y * x for y, x in memory.shapes), 32) == (*memory.pad.shape, 32)
    assert memory.valid.shape == memory.cells.shape == (2, levels, 2)
    assert_close(memory.cells[1], torch.tensor([[64 / stride, 40 / stride] for stride in strides]))
    assert len(memory.features) == 3


def test_the_last_maps_of_a_resnet_are_the_authors():
    model = pyramid(5, backbone=ResNet("resnet50", pretrained=False))
    assert model.strides == (8, 16, 32, 64, 128)
    assert [tuple(part[0].weight.shape) for part in model.project] == [
        (32, 512, 1, 1), (32, 1024, 1, 1), (32, 2048, 1, 1), (32, 2048, 3, 3), (32, 32, 3, 3)]
    dilated = pyramid(2, 1, backbone=ResNet("resnet50", dilation=True, pretrained=False))
    assert dilated.strides == (16, 32)


def test_every_level_is_what_one_level_reads():
    model, (images, pad) = pyramid(3), pictures((64, 96), (40, 64))
    memory = model(images, pad)
    features = model.backbone(images)
    for i, level in enumerate(levels_of(memory)):
        grid = pad[:, :: model.strides[i], :: model.strides[i]]
        assert_close(level.x, model.project[i](features[i]).permute(0, 2, 3, 1).flatten(1, 2))
        assert torch.equal(level.pad, grid.flatten(1))
        assert_close(level.pos, CentrePositions(32)(grid).flatten(1, 2) + model.level_embed[i])
        columns, rows = ((~line).float().mean(1) for line in (grid[:, 0], grid[:, :, 0]))
        assert_close(level.valid[:, 0], torch.stack((columns, rows), 1))
    assert [grid.shape[-2:] for grid in memory.grids()] == list(memory.shapes)
    assert_close(memory.grids()[1], model.project[1](features[1]))


def test_one_level_without_norm_is_detr():
    images, pad = pictures((64, 96), (40, 64))
    torch.manual_seed(0)
    plain = SingleLevelMemory(TinyBackbone(), CentrePositions(32), 32).eval()
    single = PyramidMemory(plain.backbone, plain.positions, 32, levels=1).eval()
    single.project[0] = plain.project
    nn.init.zeros_(single.level_embed)
    ours, theirs = single(images, pad), plain(images, pad)
    for name in ("x", "pos", "pad", "xy", "valid", "cells"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)


def test_the_views_of_a_scene_lie_side_by_side_within_a_level():
    model, (images, pad) = pyramid(2), pictures(*[(64, 96)] * 6)
    cameras = torch.eye(4).expand(2, 3, 4, 4)
    flat, memory = model(images, pad), model(images.unflatten(0, (2, 3)), pad.unflatten(0, (2, 3)), cameras)
    assert memory.x.shape == (2, 3 * flat.x.shape[1], 32)
    for ours, theirs in zip(memory.grids(), flat.grids(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("d", [16, 32, 48])
@pytest.mark.parametrize("size", [(4, 4), (5, 70), (16, 16)])
def test_a_picture_smaller_than_a_stride_has_a_cell_on_every_level(size, d):
    model = pyramid(4, 3, d)
    memory = model(*pictures(size))  # the last levels have one cell, or one row
    assert memory.x.isfinite().all() and not memory.pad.any()
    assert memory.shapes[-1][0] == 1
    batch = model(*pictures((128, 160), size))
    for level in levels_of(batch):
        assert (~level.pad[1]).any() and not level.pad[0].any()
        assert (level.xy[1, ~level.pad[1]] > 0).all() and (level.xy[1, ~level.pad[1]] < 1).all()
        assert (level.valid[1] > 0).all()
    assert batch.pos.isfinite().all() and batch.xy.isfinite().all()


def test_a_norm_of_few_channels_has_fewer_groups():
    assert [LevelNorm(d).num_groups for d in (256, 64, 48, 20)] == [32, 32, 16, 4]
    x = torch.randn(2, 64, 3, 5)
    assert_close(LevelNorm(64)(x), nn.GroupNorm(32, 64)(x))


@pytest.mark.parametrize(("levels", "maps"), [(0, 3), (3, 0)])
def test_a_pyramid_without_levels_is_refused(levels, maps):
    with pytest.raises(ValueError, match="at least one level"):
        pyramid(levels, maps)


def test_an_image_that_is_all_padding_is_refused():
    images, pad = pictures((64, 96), (64, 96))
    pad[1] = True
    with pytest.raises(ValueError, match="all padding"):
        pyramid()(images, pad)
