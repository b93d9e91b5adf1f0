"""Pictures for the chapters: images with boxes, heat maps, curves, and the figure that says where we are."""
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from torch import Tensor

from detr_nb.boxes import cxcywh_to_xyxy, scale_boxes
from detr_nb.notation import Number, Target

# After Okabe and Ito's colours, which people with the common kinds of colour blindness can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#4D4D4D")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS = 32  # of each colour in a shown image: noise in finer steps only makes the notebook's files large
STYLE = {
    "figure.dpi": 110, "figure.facecolor": "white", "savefig.facecolor": "white",
    "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}
Numbers = Tensor | np.ndarray | Sequence | range

@contextmanager
def styled() -> Iterator[None]:
    """The style holds for the length of a block, or of a decorated function, and is gone after it."""
    before = {name: plt.rcParams[name] for name in STYLE}
    plt.rcParams.update(STYLE)
    try:
        yield
    finally:
        plt.rcParams.update(before)

def colour(index: int) -> str:
    """The palette's colour for a class, a set of boxes or a curve; it repeats after eight."""
    return PALETTE[index % len(PALETTE)]

def as_array(values: Numbers) -> Shaped[np.ndarray, "..."]:
    """Any numbers as a NumPy array, detached and on the CPU."""
    return values.detach().cpu().float().numpy() if isinstance(values, Tensor) else np.asarray(values)

@styled()
def axes_grid(n: int, columns: int = 4, width: Number = 1.85, height: Number = 1.85) -> list[Axes]:
    """A new figure with `n` axes in rows of at most `columns`.

    Args:
        n: number of axes, at least 1.
        columns: most axes in one row.
        width: of one axes, inches.
        height: of one axes, inches.

    Returns:
        The axes, row by row.

    Raises:
        ValueError: if `n` is less than 1.
    """
    if n < 1:
        raise ValueError(f"axes_grid(n={n}): give at least 1")
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    figure = plt.figure(figsize=(width * columns, height * rows))
    return [figure.add_subplot(rows, columns, place + 1) for place in range(n)]

def one_axes(ax: Axes | None, width: Number, height: Number) -> Axes:
    """The given axes, or those of a new figure of one."""
    return axes_grid(1, 1, width, height)[0] if ax is None else ax

def as_picture(image: Shaped[Tensor, "3 y x"]) -> Float[np.ndarray, "y x 3"]:
    """An image as matplotlib wants it: the colours last, in [0, 1], in `LEVELS` steps.

    Args:
        image: uint8, or float in [0, 1], or float normalised by ImageNet's statistics. The last is recognised by values
            outside [0, 1].
    """
    picture = image.detach().cpu().float() / (1 if image.is_floating_point() else 255)
    if picture.numel() and (picture.min() < -0.01 or picture.max() > 1.01):
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        picture = picture * std[:, None, None] + mean[:, None, None]
    coarse = (picture.clamp(0, 1) * (LEVELS - 1)).round() / (LEVELS - 1)
    return coarse.permute(1, 2, 0).numpy()

def draw_box(ax: Axes, box_xyxy: Sequence[Number], colour: str, text: str = "", dashed: bool = False) -> None:
    """One rectangle with its text on a patch: above the upper left corner, in the lower right one if dashed."""
    x0, y0, x1, y1 = box_xyxy
    style = {"fill": False, "edgecolor": colour, "linewidth": 1.6, "linestyle": "--" if dashed else "-"}
    ax.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, **style))
    if text:
        patch = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        x, y, side = (x1, y1, "right") if dashed else (x0, y0, "left")
        ax.text(x, y, text, color="white", fontsize=6.5, ha=side, va="bottom", bbox=patch)

def caption(label: int | None, names: Sequence[str] | None, score: float | None) -> str:
    """What stands at a box: its class by name (by number without names), and its score."""
    words = [] if label is None else [names[label] if names else str(label)]
    return " ".join(words + ([] if score is None else [f"{score:.2f}"]))

@styled()
def show_image(
    image: Shaped[Tensor, "3 y x"], boxes: Float[Tensor, "t 4"] | None = None, labels: Numbers | None = None,
    names: Sequence[str] | None = None, scores: Numbers | None = None, title: str = "", ax: Axes | None = None,
    masks: Bool[Tensor, "t y x"] | None = None,
) -> None:
    """Show an image with its boxes drawn back onto it.

    Args:
        image: uint8, or float in [0, 1], or normalised by ImageNet's statistics.
        boxes: normalised cxcywh.
        labels: class of each box; decides its colour.
        names: name of each class.
        scores: of each box, in [0, 1].
        title: what the reader should see.
        ax: where to draw; a new figure otherwise.
        masks: shaded over the image in the colours of their boxes.
    """
    ax = one_axes(ax, 3, 3)
    picture, count = as_picture(image), 0 if boxes is None else len(boxes)
    kinds = [None] * count if labels is None else [int(label) for label in labels]
    tones = [colour(kind or 0) for kind in kinds]
    for mask, tone in zip(() if masks is None else masks.cpu().numpy(), tones, strict=False):
        picture[mask] = 0.45 * picture[mask] + 0.55 * np.array(to_rgb(tone))
    height, width = picture.shape[:2]
    grows = height <= ax.get_window_extent().height
    ax.imshow(picture, extent=(0, width, height, 0), interpolation="nearest" if grows else "antialiased")
    corners = [] if boxes is None else scale_boxes(cxcywh_to_xyxy(boxes.detach().cpu()), height, width).tolist()
    marks = [None] * count if scores is None else [float(score) for score in scores]
    for corner, kind, mark, tone in zip(corners, kinds, marks, tones, strict=True):
        draw_box(ax, corner, tone, caption(kind, names, mark))
    ax.set(title=title, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)

def show_images(
    images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None, names: Sequence[str] | None = None,
    titles: Sequence[str] | None = None, columns: int = 4,
) -> None:
    """Show several images, with the boxes (and masks) of their targets, in rows of `columns`."""
    for place, ax in enumerate(axes_grid(len(images), columns, 7.4 / columns, 7.4 / columns)):
        target = targets[place] if targets else {}
        show_image(images[place], target.get("boxes"), target.get("labels"), names,
                   title=titles[place] if titles else "", ax=ax, masks=target.get("masks"))

@styled()
def show_boxes(
    sets: Mapping[str, Tensor], labels: Mapping | None = None, title: str = "",
    ax: Axes | None = None,
) -> None:
    """Draw sets of boxes in the unit square, y downwards: the first set solid, the others dashed.

    Args:
        sets: name of each set and its boxes, normalised cxcywh.
        labels: for each named set, a text or number for each box; without it boxes are numbered from 0.
        title: what the reader should see.
        ax: where to draw; a new figure otherwise.
    """
    ax = one_axes(ax, 3.6, 3.4)
    for place, (name, boxes) in enumerate(sets.items()):
        texts = (labels or {}).get(name, range(len(boxes)))
        ax.plot([], [], color=colour(place), linestyle="--" if place else "-", label=name)
        for corner, text in zip(cxcywh_to_xyxy(boxes.detach().cpu()).tolist(), texts, strict=True):
            draw_box(ax, corner, colour(place), str(text), dashed=place > 0)
    ax.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", title=title, xlabel="x", ylabel="y")
    if len(sets) > 1:
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(sets))

def colour_range(matrix: Shaped[np.ndarray, "y x"]) -> dict[str, str | float]:
    """White to blue from 0 for weights; purple to orange around 0 where there are negative numbers."""
    numbers = matrix[np.isfinite(matrix)]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 1.0)
    if low >= 0:
        return {"cmap": "Blues", "vmin": 0.0, "vmax": high or 1.0}
    return {"cmap": "PuOr", "vmin": -max(-low, high), "vmax": max(-low, high)}

def write_numbers(ax: Axes, matrix: Shaped[np.ndarray, "y x"], scale: Mapping[str, str | float]) -> None:
    """Write each number into its cell, dark on light and light on dark."""
    middle, reach = (scale["vmin"] + scale["vmax"]) / 2, (scale["vmax"] - scale["vmin"]) / 2
    whole = np.isfinite(matrix).all() and (matrix == matrix.round()).all()
    for (row, column), value in np.ndenumerate(matrix):
        depth = value / scale["vmax"] if scale["vmin"] == 0 else abs(value - middle) / reach
        text = f"{value:.0f}" if whole else f"{value:.2f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if depth > 0.6 else "#222222")

@styled()
def heatmap(
    matrix: Shaped[Tensor, "y x"] | Shaped[np.ndarray, "y x"] | Sequence, rows: Sequence | None = None,
    columns: Sequence | None = None, title: str = "", xlabel: str = "", ylabel: str = "", numbers: bool | None = None,
    ax: Axes | None = None,
) -> None:
    """Show a matrix as colours: white is 0.

    Args:
        matrix: any numbers, the first row on top.
        rows: names of the rows.
        columns: names of the columns.
        title: what the reader should see.
        xlabel: what the columns are.
        ylabel: what the rows are.
        numbers: write the values into the cells; by default where there are at most 100.
        ax: where to draw; a new figure with a colour bar otherwise.
    """
    alone, ax, values = ax is None, one_axes(ax, 4, 3.2), as_array(matrix).astype(float)
    scale = colour_range(values)
    image = ax.imshow(values, aspect="auto" if max(values.shape) > 12 * min(values.shape) else "equal", **scale)
    if values.size <= 100 if numbers is None else numbers:
        write_numbers(ax, values, scale)
    elif alone:
        ax.figure.colorbar(image, ax=ax, shrink=0.8)
    name_ticks(ax, rows, columns)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.spines[:].set_visible(False)

def name_ticks(ax: Axes, rows: Sequence | None, columns: Sequence | None) -> None:
    """Names instead of numbers at the cells of a matrix; long column names are turned."""
    if rows is not None:
        ax.set_yticks(range(len(rows)), [str(row) for row in rows])
    if columns is not None:
        words = [str(column) for column in columns]
        turn = 45 if sum(map(len, words)) > 40 else 0
        ax.set_xticks(range(len(words)), words, rotation=turn, ha="right" if turn else "center", fontsize=8)

@styled()
def heatmaps(
    matrices: Sequence | Shaped[Tensor, "n y x"], titles: Sequence[str], columns: int = 4, title: str = ""
) -> None:
    """Show several matrices side by side, each with its own colour range, without ticks."""
    axes = axes_grid(len(matrices), columns, 7.4 / columns, 7.4 / columns)
    for matrix, name, ax in zip(matrices, titles, axes, strict=True):
        heatmap(matrix, title=name, numbers=False, ax=ax)
        ax.set(xticks=[], yticks=[])
    axes[0].figure.suptitle(title, fontsize=10)

def mark_places(ax: Axes, marks: Mapping) -> None:
    """Name places: a number is a vertical line at that x, a pair a dot at (x, y)."""
    for text, place in marks.items():
        if isinstance(place, tuple):
            ax.plot(*place, "o", color="#222222", markersize=4)
            ax.annotate(text, place, (5, -9), textcoords="offset points", fontsize=7)
        else:
            ax.axvline(place, color="#777777", linestyle=":", linewidth=1)
            ax.text(place, 1, f" {text}", transform=ax.get_xaxis_transform(), fontsize=7, va="top")

def finish(ax: Axes, names: Sequence, logx: bool, logy: bool, **words: str) -> None:
    """Scales, words and a legend where there is more than one name."""
    ax.set(xscale="log" if logx else "linear", yscale="log" if logy else "linear", **words)
    ax.grid(alpha=0.25)
    if len(names) > 1:
        ax.legend(fontsize=7)

@styled()
def curves(
    lines: Mapping, xlabel: str = "", ylabel: str = "", title: str = "",
    logx: bool = False, logy: bool = False, marks: Mapping | None = None,
    ax: Axes | None = None,
) -> None:
    """Draw curves over one axis.

    Args:
        lines: name and (x, y) of each curve.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        title: what the reader should see.
        logx: logarithmic x.
        logy: logarithmic y.
        marks: name of places to point at: a number is a vertical line at that x, a pair a dot at (x, y).
        ax: where to draw; a new figure otherwise.
    """
    ax = one_axes(ax, 5, 3)
    for place, (name, (x, y)) in enumerate(lines.items()):
        few = "o" if len(x) <= 12 else None
        ax.plot(as_array(x), as_array(y), label=name, color=colour(place), linewidth=1.6, marker=few, markersize=3)
    finish(ax, list(lines), logx, logy, xlabel=xlabel, ylabel=ylabel, title=title)
    mark_places(ax, marks or {})

@styled()
def scatter(
    points: Mapping, xlabel: str = "", ylabel: str = "", title: str = "",
    logx: bool = False, logy: bool = False, marks: Mapping | None = None,
    ax: Axes | None = None,
) -> None:
    """Draw clouds of points over one axis; arguments as in `curves`."""
    ax = one_axes(ax, 5, 3)
    for place, (name, (x, y)) in enumerate(points.items()):
        faint = 0.9 if len(x) <= 50 else 0.35
        ax.scatter(as_array(x), as_array(y), s=10, label=name, color=colour(place), alpha=faint, linewidths=0)
    finish(ax, list(points), logx, logy, xlabel=xlabel, ylabel=ylabel, title=title)
    mark_places(ax, marks or {})

@styled()
def bars(values: Mapping, ylabel: str = "", title: str = "", ax: Axes | None = None) -> None:
    """Draw one bar for each name, with its value on top.

    Args:
        values: name and height of each bar.
        ylabel: what the height is, with its unit.
        title: what the reader should see.
        ax: where to draw; a new figure otherwise.
    """
    ax = one_axes(ax, 5, 3)
    drawn = ax.bar(range(len(values)), [float(value) for value in values.values()], color=colour(0), width=0.7)
    if len(values) <= 12:
        ax.bar_label(drawn, fmt="%.3g", fontsize=7)
    name_ticks(ax, None, list(values))
    ax.set(ylabel=ylabel, title=title)

PLACES = {  # noun: number, what it answers, column, row
    "shapes": ("04", "drawn scenes", 0, 0), "data": ("05", "images, targets", 0, 1),
    "positions": ("02", "where a cell is", 1, 0), "backbone": ("06", "CNN features", 1, 1),
    "attention": ("01", "who looks where", 2, 0), "transformer": ("07", "encoder, decoder", 2, 1),
    "notation": ("00", "words of all", 3, 0), "model": ("08", "queries, heads", 3, 1),
    "boxes": ("03", "formats, overlap", 4, 0), "matcher": ("09", "who finds what", 4, 1),
    "plots": ("90", "pictures of all", 5, 0), "losses": ("10", "how wrong", 5, 1),
    "evaluation": ("11", "how good", 6, 0), "training": ("12", "learn from it", 6, 1),
}
ARROWS = (
    ("shapes", "data"), ("data", "backbone"), ("backbone", "transformer"), ("transformer", "model"),
    ("model", "matcher"), ("matcher", "losses"), ("losses", "training"), ("training", "evaluation"),
    ("positions", "attention"), ("attention", "transformer"), ("boxes", "matcher"),
)
PITCH, BOX = (114, 64), (100, 42)  # from box to box, and of a box: (right, down), pixels

@dataclass(frozen=True, repr=False)
class Picture:
    """An SVG that Jupyter displays, and the sentence that says what it shows."""

    svg: str
    text: str

    def _repr_svg_(self) -> tuple[str, dict[str, str]]:
        return self.svg, {"alt": self.text}

    def __repr__(self) -> str:
        return self.text

def svg_box(noun: str, lit: bool) -> str:
    """The box of one chapter: its number and noun, and what it answers."""
    number, answers, column, row = PLACES[noun]
    (width, height), x, y = BOX, 8 + PITCH[0] * column, 8 + PITCH[1] * row
    fill, ink = ("#0072B2", "#ffffff") if lit else ("#ffffff", "#24292f")
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="#0072B2"/>'
        f'<text x="{x + width / 2}" y="{y + 18}" fill="{ink}" font-size="11" font-weight="bold">{number} {noun}</text>'
        f'<text x="{x + width / 2}" y="{y + 33}" fill="{ink}" font-size="10">{answers}</text>'
    )

def svg_arrow(start: str, end: str) -> str:
    """A line with a head across the gap between two chapters that stand side by side or one above the other."""
    right, down = (PLACES[end][axis] - PLACES[start][axis] for axis in (2, 3))
    centre = [8 + PITCH[axis] * PLACES[start][2 + axis] + BOX[axis] / 2 for axis in (0, 1)]
    x, y = centre[0] + right * BOX[0] / 2, centre[1] + down * BOX[1] / 2
    dx, dy = (PITCH[0] - BOX[0] - 2) * right, (PITCH[1] - BOX[1] - 2) * down
    return f'<path d="M{x} {y}l{dx} {dy}" stroke="#57606a" stroke-width="1.5" marker-end="url(#head)"/>'

def pipeline(current: str) -> Picture:
    """The where-are-we figure: the chapters along DETR's pipeline, the current one lit.

    Args:
        current: the chapter's noun, for example "matcher".

    Returns:
        A picture that Jupyter displays.

    Raises:
        ValueError: if no chapter of the figure has that noun.
    """
    if current not in PLACES:
        raise ValueError(f"pipeline({current!r}): no such chapter in the figure, give one of {', '.join(PLACES)}")
    text = f"Where we are: chapter {PLACES[current][0]}, {current}, in the pipeline from images to a trained DETR."
    parts = [svg_arrow(*arrow) for arrow in ARROWS] + [svg_box(noun, noun == current) for noun in PLACES]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 122" width="800" role="img" aria-label="{text}">'
        f'<title>{text}</title><defs><marker id="head" viewBox="0 0 6 6" refX="4" refY="3" markerWidth="5" '
        'markerHeight="5" orient="auto"><path d="M0 0L6 3L0 6z" fill="#57606a"/></marker></defs>'
        '<rect width="800" height="122" rx="8" fill="#f6f8fa"/>'
        f'<g font-family="sans-serif" text-anchor="middle">{"".join(parts)}</g></svg>'
    )
    return Picture(svg, text)
