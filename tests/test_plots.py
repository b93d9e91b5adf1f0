"""The drawing helpers: what they draw stands where it should, and nothing leaks out of them."""

from pathlib import Path

import matplotlib
import nbclient
import nbformat
import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from detr_nb import plots  # noqa: E402

NBS = Path(__file__).resolve().parents[1] / "nbs"


@pytest.fixture(autouse=True)
def no_figure_left():
    yield
    plt.close("all")


def rectangles(ax):
    """Corners of the rectangles drawn in axes."""
    return torch.tensor(np.array([patch.get_bbox().extents for patch in ax.patches])).float()


def words(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("dress", ["bytes", "floats", "normalised"])
def test_a_picture_is_the_same_in_every_dress(dress):
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    floats = image / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    given = {"bytes": image, "floats": floats, "normalised": (floats - mean[:, None, None]) / std[:, None, None]}[dress]
    picture = plots.as_picture(given)
    assert picture.shape == (5, 7, 3)
    np.testing.assert_allclose(picture, floats.permute(1, 2, 0), atol=0.5 / (plots.LEVELS - 1) + 1e-6)


def test_showing_does_not_change_the_image():
    image, masks = torch.rand(3, 6, 8), torch.ones(1, 6, 8, dtype=torch.bool)
    before = image.clone()
    plots.show_image(image, torch.tensor([[0.5, 0.5, 0.5, 0.5]]), [0], masks=masks)
    assert torch.equal(image, before)


def test_boxes_are_drawn_where_torchvision_puts_them_also_in_an_image_that_is_not_square():
    boxes = torch.rand(5, 4) / 2 + 0.1
    plots.show_image(torch.zeros(3, 40, 90), boxes, range(5), list("abcde"), scores=torch.linspace(0, 1, 5))
    ax = plt.gca()
    expected = box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([90, 40, 90, 40])
    torch.testing.assert_close(rectangles(ax), expected, rtol=1e-4, atol=1e-3)
    assert words(ax) == ["a 0.00", "b 0.25", "c 0.50", "d 0.75", "e 1.00"]
    assert ax.get_ylim() == (40, 0), "rows must run downwards"


def test_masks_shade_only_their_pixels():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 1, 2] = True
    plots.show_image(torch.zeros(3, 4, 4), torch.tensor([[0.5, 0.5, 1.0, 1.0]]), [1], masks=masks)
    shown = np.asarray(plt.gca().images[0].get_array())
    assert (shown[1, 2] > 0).any() and shown.sum() == shown[1, 2].sum()


@pytest.mark.parametrize("count", [0, 1])
def test_an_image_without_objects_is_legal(count):
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    plots.show_images([torch.rand(3, 8, 9)], [target] * count or None)
    assert not plt.gca().patches


def test_show_images_takes_images_of_different_sizes():
    images = [torch.rand(3, 8, 9), torch.rand(3, 20, 5), torch.zeros(3, 7, 7, dtype=torch.uint8)]
    plots.show_images(images, titles=["a", "b", "c"], columns=2)
    assert [ax.get_title() for ax in plt.gcf().axes] == ["a", "b", "c"]


def test_sets_of_boxes():
    two = torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.4, 0.4]])
    sets = {"one": torch.tensor([[0.5, 0.5, 0.2, 0.4]]), "two": two}
    plots.show_boxes(sets, {"two": ["cat", "dog"]})
    ax = plt.gca()
    torch.testing.assert_close(rectangles(ax), box_convert(torch.cat(list(sets.values())), "cxcywh", "xyxy"))
    assert words(ax) == ["0", "cat", "dog"]
    assert [patch.get_linestyle() for patch in ax.patches] == ["-", "--", "--"]
    with pytest.raises(ValueError):
        plots.show_boxes(sets, {"two": ["only one"]})


@pytest.mark.parametrize(
    ("matrix", "white"),
    [(torch.rand(3, 4), 0.0), (torch.randn(3, 4) - 1, 0.5), (torch.zeros(2, 2), 0.0), ([[1, 2], [3, 4]], 0.0)],
)
def test_white_is_zero(matrix, white):
    plots.heatmap(matrix)
    assert plt.gca().images[0].norm(0.0) == pytest.approx(white)


def test_heat_maps_bear_what_is_not_finite_and_what_has_a_gradient():
    plots.heatmap(torch.tensor([[1.0, float("nan")], [float("inf"), 0.5]], requires_grad=True))
    plots.heatmap(torch.full((2, 2), float("nan")))


def test_numbers_are_written_up_to_a_hundred_cells():
    plots.heatmap(torch.rand(10, 10))
    assert len(words(plt.gca())) == 100
    plots.heatmap(torch.rand(10, 11))
    assert not words(plt.gcf().axes[0])
    plots.heatmap(torch.tensor([[1, 20], [3, 4]]), rows=["a", "b"], columns=["c", "d"])
    assert words(plt.gca()) == ["1", "20", "3", "4"]
    assert [label.get_text() for label in plt.gca().get_xticklabels()] == ["c", "d"]


@pytest.mark.parametrize("draw", [plots.curves, plots.scatter])
def test_any_numbers_can_be_drawn(draw):
    x = torch.linspace(0, 1, 5, requires_grad=True)
    arrays, lists = (np.arange(5), np.ones(5)), ([0, 1, 2], [1, 2, 3])
    lines = {"tensor": (x, x**2), "array": arrays, "list": lists, 4: (range(3), range(3))}
    draw(lines, "x", "y", "title", logy=True, marks={"line": 0.5, "dot": (1, 1)})
    ax = plt.gca()
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(), ax.get_yscale()) == ("x", "y", "title", "log")
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"tensor", "array", "list", "4"}


def test_no_tick_stands_between_two_steps():
    (ax,) = plots.axes_grid(1)
    plots.curves({"loss": (range(1, 5), [4, 3, 2, 1])}, ax=ax)
    assert all(float(place).is_integer() for place in ax.get_xticks())
    (ax,) = plots.axes_grid(1)
    plots.curves({"share": ([0.5, 1.0, 1.5], [4, 3, 2])}, ax=ax)
    assert not all(float(place).is_integer() for place in ax.get_xticks())


def test_few_points_on_a_logarithmic_axis_are_named():
    ax = plots.axes_grid(1)[0]
    plots.curves({"one": ((50, 100, 200), (1, 2, 3)), "two": ((100, 400), (1, 2))}, logx=True, ax=ax)
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_xticklabels()] == ["50", "100", "200", "400"]
    assert len(ax.xaxis.get_minorticklocs()) == 0


def test_bars_have_the_given_heights():
    plots.bars({"a": 3, "b": torch.tensor(1.5), 7: 0})
    assert [patch.get_height() for patch in plt.gca().patches] == [3, 1.5, 0]


def test_axes_can_be_given_and_nothing_is_returned():
    axes = plots.axes_grid(4, columns=2)
    results = [
        plots.heatmap(torch.rand(2, 2), ax=axes[0]), plots.curves({"a": ([0, 1], [0, 1])}, ax=axes[1]),
        plots.bars({"a": 1}, ax=axes[2]), plots.show_image(torch.rand(3, 4, 4), ax=axes[3]),
    ]
    assert results == [None] * 4, "a returned object would be printed under the figure"
    assert len(plt.get_fignums()) == 1 and plt.gcf().axes == axes
    with pytest.raises(ValueError, match="at least 1"):
        plots.axes_grid(0)


def test_the_style_stays_inside_the_helpers():
    before = dict(plt.rcParams)
    plots.bars({"a": 1})
    plots.show_images([torch.rand(3, 4, 4)])
    with pytest.raises(ValueError):
        plots.show_boxes({"a": torch.rand(2, 4)}, {"a": []})
    plots.heatmaps(torch.rand(3, 4, 4), ["a", "b", "c"])
    assert dict(plt.rcParams) == before
    assert plt.gcf().get_dpi() == 110 and matplotlib.colors.to_hex(plt.gcf().get_facecolor()) == "#ffffff"


@pytest.mark.slow
def test_every_cell_of_a_notebook_shows_its_figure():
    """In a fresh kernel, where the first figure also switches matplotlib on."""
    calls = ["axes_grid(2)", "bars({'a': 1})", "show_images([__import__('torch').rand(3, 8, 8)])"]
    cells = [nbformat.v4.new_code_cell(f"import detr_nb.plots as p; p.{call};") for call in calls]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(NBS.parent)}}).execute()
    shown = [sorted(key for out in cell.outputs for key in out.data if key.startswith("image")) for cell in book.cells]
    assert shown == [["image/png"]] * 3
