"""The shared words: the sample agrees with itself, `expect_error` is strict, and the library keeps to the letters."""

import ast
import re
from pathlib import Path

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from detr_nb.notation import (
    AXES,
    Memory,
    Number,
    Output,
    Target,
    check_exercise,
    expect_error,
    toy_image,
    toy_output,
    toy_targets,
)

LIBRARY = Path(__file__).resolve().parents[1] / "detr_nb"
TYPES = {"Float", "Bool", "Int", "UInt8", "Integer", "Num", "Shaped", "Real", "Complex"}


# --- expect_error -------------------------------------------------------------------------------------------------
def test_expect_error_prints_the_message_without_its_details(capsys):
    with expect_error(ValueError):
        raise ValueError("first\nsecond\n----------------------\nCalled with parameters: 1000 lines")
    assert capsys.readouterr().out == "ValueError: first\nsecond\n"


def test_expect_error_wants_an_error():
    with pytest.raises(AssertionError, match="nothing was raised"), expect_error(ValueError):
        pass


def test_expect_error_lets_other_kinds_through():
    with pytest.raises(KeyError), expect_error(ValueError):
        raise KeyError("x")
    with pytest.raises(KeyboardInterrupt), expect_error(Exception):
        raise KeyboardInterrupt


def test_expect_error_wants_the_words():
    with pytest.raises(AssertionError, match="expected 'boxes'") as caught, expect_error(ValueError, "boxes"):
        raise ValueError("labels")
    assert isinstance(caught.value.__cause__, ValueError)


def test_expect_error_takes_words_literally_and_ignores_case():
    with expect_error(ValueError, "F32[2,3] (A+B)?"):
        raise ValueError("got f32[2,3] (a+b)? here")
    with pytest.raises(AssertionError), expect_error(ValueError, "a.b"):
        raise ValueError("axb")


def test_expect_error_knows_subclasses(capsys):
    with expect_error(LookupError, "gone"):
        raise KeyError("gone")
    assert capsys.readouterr().out.startswith("KeyError")


# --- the sample ---------------------------------------------------------------------------------------------------
def cells_inside(box: Tensor) -> Tensor:
    """True for the cells of the 6 x 8 grid whose centre lies in a normalised cxcywh box, one cell at a time."""
    cx, cy, w, h = box.tolist()
    inside = torch.zeros(6, 8, dtype=torch.bool)
    for y in range(6):
        for x in range(8):
            inside[y, x] = abs((x + 0.5) / 8 - cx) <= w / 2 and abs((y + 0.5) / 6 - cy) <= h / 2
    return inside


def test_the_picture_shows_what_the_targets_say():
    image, target = toy_image(), toy_targets()[0]
    assert image.shape == (3, *target["size"]) and image.min() >= 0 and image.max() <= 1
    for box, pixel in zip(target["boxes"], (image[:, 2, 1], image[:, 3, 5]), strict=True):
        same_colour = (image == pixel[:, None, None]).all(0)
        assert torch.equal(same_colour, cells_inside(box))


def test_the_picture_has_four_colours():
    assert len(torch.unique(toy_image().flatten(1).T, dim=0)) == 4


def test_targets_are_legal():
    target = toy_targets()[0]
    low, high = target["boxes"][:, :2] - target["boxes"][:, 2:] / 2, target["boxes"][:, :2] + target["boxes"][:, 2:] / 2
    assert low.min() >= 0 and high.max() <= 1 and (high > low).all()
    assert target["labels"].dtype == torch.int64 and target["labels"].tolist() == [0, 1]
    assert Target.__required_keys__ == {"labels", "boxes"}


def test_the_last_layer_of_the_toy_output_is_the_better_one():
    out, target = toy_output(), toy_targets()[0]
    assert out.logits[-1, 0].argmax(-1).tolist() == [1, 2, 0]  # dog, no-object, cat
    far, near = ((layer[0, [2, 0]] - target["boxes"]).abs().sum() for layer in out.boxes)
    assert near < far / 4


def test_every_call_makes_a_new_sample():
    for make in (toy_image, lambda: toy_targets()[0]["boxes"], lambda: toy_output().logits):
        first = make()
        first.zero_()
        assert make().abs().sum() > 0


# --- types and letters --------------------------------------------------------------------------------------------
def test_number_takes_5_and_5_point_0_but_no_text():
    from beartype import beartype

    @jaxtyped(typechecker=beartype)
    def twice(factor: Number) -> Number:
        return 2 * factor

    assert twice(5) == twice(5.0) == 10
    with pytest.raises(TypeCheckError):
        twice("5")


def test_one_letter_is_one_size_in_one_call():
    from beartype import beartype

    @jaxtyped(typechecker=beartype)
    def same(a: Float[Tensor, "q d"], b: Float[Tensor, "s d"]) -> Float[Tensor, "q s"]:
        return a @ b.T

    assert same(torch.zeros(2, 3), torch.zeros(4, 3)).shape == (2, 4)
    with pytest.raises(TypeCheckError):
        same(torch.zeros(2, 3), torch.zeros(4, 2))


def axis_words(path: Path) -> set[str]:
    """Every axis word that stands in a jaxtyping annotation of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        is_type = isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in TYPES
        if is_type and isinstance(node.slice, ast.Tuple):
            found |= {word for part in node.slice.elts if isinstance(part, ast.Constant) for word in part.value.split()}
    return found


def test_axis_words_of_a_sample_are_found(tmp_path):
    sample = tmp_path / "sample.py"
    sample.write_text('def f(a: Float[Tensor, "#b *n 4"], b: Bool[Tensor, " t"] | None = None): ...\n')
    assert axis_words(sample) == {"#b", "*n", "4", "t"}


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("[a-z]*.py")), ids=lambda path: path.stem)
def test_the_library_keeps_to_the_letters(path):
    words = {re.sub(r"^[#*?]+|\d+$", "", word) for word in axis_words(path)}
    letters = {word for word in words if len(word) == 1 and word.isalpha()}
    assert letters <= set(AXES), f"{path.name} uses axis letters that chapter 00 does not list"


def test_output_fields_have_the_layer_axis_before_the_batch():
    out = toy_output()
    assert Output._fields[:2] == ("logits", "boxes") and out.logits.shape[:3] == out.boxes.shape[:3] == (2, 1, 3)


def full_output() -> Output:
    """An output with every field, and two extra parts: one of as many layers, one of a single layer."""
    out = toy_output()
    out = out._replace(content=torch.rand(2, 1, 3, 8), masks=torch.rand(1, 3, 4, 5))
    return out._replace(extra={"same": out._replace(matches=[], repeats=2), "one": toy_output().layer(0)})


def test_apply_reaches_every_tensor_of_an_output():
    out = full_output()
    changed = out.apply(lambda value: 2 * value)
    for before, after in ((out, changed), (out.extra["same"], changed.extra["same"])):
        for name in ("logits", "boxes", "content", "masks"):
            assert torch.equal(getattr(after, name), 2 * getattr(before, name))
    assert changed.extra["same"].repeats == 2 and changed.extra["same"].matches == []
    assert changed.extra["one"].content is None


def test_a_layer_keeps_its_axis_and_takes_extra_parts_along():
    out = full_output()
    assert torch.equal(out.layer(-1).boxes, out.boxes[1:]) and torch.equal(out.layer(1).masks, out.masks)
    first = out.layer(0)
    assert torch.equal(first.content, out.content[:1]) and first.masks is None
    assert len(first.extra["same"].boxes) == 1 and torch.equal(first.extra["one"].boxes, out.extra["one"].boxes)


def test_some_queries_of_an_output():
    out = full_output()
    some = out.queries(slice(1, 3))
    assert torch.equal(some.logits, out.logits[:, :, 1:]) and torch.equal(some.masks, out.masks[:, 1:])
    assert some.extra == {} and torch.equal(out.queries(torch.tensor([2, 0])).content, out.content[:, :, [2, 0]])


def test_grids_of_levels_and_views_come_back_row_by_row():
    shapes, cameras = ((2, 3), (1, 2)), torch.eye(4).expand(1, 2, 4, 4)
    pictures = [torch.rand(2, 5, *shape) for shape in shapes]  # of two views
    x = torch.cat([picture.permute(0, 2, 3, 1).flatten(0, 2) for picture in pictures])[None]
    pad = torch.zeros(1, x.shape[1], dtype=torch.bool)
    pad[0, 3] = True
    memory = Memory(x, x, pad, torch.rand(1, x.shape[1], 2), shapes, (), cameras=cameras)
    torch.testing.assert_close(memory.grids(), pictures)
    assert memory.sides().tolist() == [[3, 2], [2, 1]]
    assert (memory.masked().x[0, 3] == 0).all() and torch.equal(memory.masked().x[0, 4:], x[0, 4:])


def test_an_exercise_is_open_wrong_or_right(capsys):
    def check(answer):
        assert answer() == 2

    def open_answer():
        raise NotImplementedError

    for answer, said in ((open_answer, "open"), (lambda: 1, "not yet: AssertionError"), (lambda: 2, "right"),
                         (lambda: 1 / 0, "not yet: ZeroDivisionError")):
        check_exercise(check, answer)
        out = capsys.readouterr().out
        assert out.startswith(said) and ("at: assert answer() == 2" in out) == said.startswith("not yet")


def test_a_check_that_is_type_checked_shows_its_own_line(capsys):
    @jaxtyped(typechecker=beartype)
    def check(answer: int) -> None:
        assert answer == 2, "twice one"

    check_exercise(check, 3)
    assert "at: assert answer == 2" in capsys.readouterr().out
