"""Every exercise with a check: what is not written is open, the solution is right, and plausible wrong answers are not.

No chapter runs here. Of each the statements are taken that its stubs and checks need, found by their names (`needed`),
and run in a folder with links to tests/ and results/; what the library exports comes from the library. A solution is
what nbs/solutions/ writes in the place of the stub, with what it needs of that notebook.

`ANSWERS` holds wrong answers to each exercise, and a right one that is written in another way. Each is Python that
takes the place of the stub, or pairs of texts: the solution, in which the first is replaced by the second.
"""

import ast
import builtins
import dataclasses
import json
import linecache
import re
import symtable
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType

import numpy as np
import pytest
import torch
from jaxtyping._import_hook import JaxtypingTransformer, Typechecker
from torch import Tensor, nn

from detr_nb.config import KINDS
from detr_nb.notation import check_exercise

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
IMPORTS, DEFINITIONS = (ast.Import, ast.ImportFrom), (ast.FunctionDef, ast.ClassDef)

# Statements that bind nothing, and change what a name holds or what lies in a folder.
CHANGES = {
    "14_pretrained": {
        "spec.loader.exec_module(fill)": "fill",
        "folder.mkdir(parents=True, exist_ok=True)": "folder",
        'torch.save({"model": weights}, folder / "official.pth")': "folder",
    },
    "85_formats": {
        '(work / "toy.json").write_text(json.dumps(toy_coco))': "work",
        'for image in toy_coco["images"]:': "work",
        "    (yolo / part).mkdir(": "yolo",
        '    shutil.copy(work / f"{name}.png", yolo / "images")': "yolo",
        '(yolo / "data.yaml").write_text(': "yolo",
        '(yolo / "labels" / "one.txt").write_text(': "yolo",
    },
    "88_checkpoints": {"folder.mkdir(parents=True)": "folder"},
    "solutions/12_training": {"    train_step(trained, criterion, old, batch, 0.1)": "trained"},
}
# What these tests do with less work than the solution.
LIGHTER = {"range(75)": "range(25)", "index=i) for i in range(200)]": "index=i) for i in range(40)]"}

# --- the statements of a notebook -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement at the top of a code cell: what it binds, and what it reads, the insides of functions included."""

    tree: ast.stmt
    text: str
    cell: int
    code: object  # compiled, with the type checker if the notebook switches it on
    home: str  # the module of the library that has it, or ""
    binds: frozenset[str]
    reads: frozenset[str]


def names_of(text: str, changes: Mapping[str, str] = MappingProxyType({})) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a statement binds where it stands, and those that it reads from outside, in functions as well."""
    top = symtable.symtable(text, "statement", "exec")
    binds = {name.get_name() for name in top.get_symbols() if name.is_assigned() or name.is_imported()}
    reads = {name.get_name() for name in top.get_symbols() if name.is_referenced()}
    tables = top.get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        reads |= {name.get_name() for name in table.get_symbols() if name.is_global() and name.is_referenced()}
    binds |= {name for change, name in changes.items() if change in text}
    return frozenset(binds), frozenset(reads)


def compiled(text: str, file: str, checked: bool) -> object:
    """The code of a text, whose lines a traceback can show, as a cell with or without the type checker has it."""
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    tree = ast.parse(text)
    if checked:
        tree = ast.fix_missing_locations(JaxtypingTransformer(typechecker=Typechecker("beartype.beartype")).visit(tree))
    return compile(tree, file, "exec", dont_inherit=True)


def source_of(tree: ast.stmt, lines: list[str]) -> str:
    """The lines of a statement, decorators included."""
    first = min([tree.lineno, *(mark.lineno for mark in getattr(tree, "decorator_list", []))])
    return "\n".join(lines[first - 1 : tree.end_lineno]) + "\n"


@cache
def statements(path: Path) -> tuple[Statement, ...]:
    """All statements of a notebook's code cells, without magics and shell commands."""
    found, module, checked = [], "", "%jaxtyping.typechecker" in path.read_text("utf8")
    changes = CHANGES.get(path.relative_to(NBS).with_suffix("").as_posix(), {})
    for number, cell in enumerate(json.loads(path.read_text("utf8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        lines = ["pass" if line.startswith(("%", "!")) else line for line in "".join(cell["source"]).splitlines()]
        lines = [re.sub(r"^(\s+)[%!].*", r"\1pass", line) for line in lines]
        exported = any(line.startswith("#| export") for line in lines)
        module = next((line.split()[2] for line in lines if line.startswith("#| default_exp")), module)
        for tree in ast.parse("\n".join(lines)).body:
            text = source_of(tree, lines)
            for much, little in LIGHTER.items():
                text = text.replace(much, little)
            name = f"{path.relative_to(NBS)}[{number}] line {tree.lineno}"
            home = f"detr_nb.{module}" if exported and not isinstance(tree, IMPORTS) else ""
            code = None if home else compiled(text, name, checked)
            found.append(Statement(tree, text, number, code, home, *names_of(text, changes)))
    return tuple(found)


def needed(names: set[str], end: int, of: Sequence[Statement]) -> set[int]:
    """Places of the statements before `end` that these names need: the last that binds each, and what that reads."""
    chosen, seen, wanted = set(), set(), {(name, end) for name in names}
    while wanted:
        name, end = one = wanted.pop()
        if one in seen or (place := next((i for i in reversed(range(end)) if name in of[i].binds), None)) is None:
            continue
        seen.add(one)
        chosen.add(place)
        wanted |= {(other, place) for other in of[place].reads if not of[place].home}
    return chosen


def execute(chosen: Sequence[Statement], space: dict) -> None:
    """Run statements in order; what the library has comes from there."""
    for one in chosen:
        if one.home:
            space |= {name: getattr(import_module(one.home), name) for name in one.binds}
        else:
            exec(one.code, space)


# --- an exercise ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Exercise:
    """A cell that calls `check_exercise`, with all that it needs."""

    chapter: str  # its path below nbs/, without the ending
    place: int  # of that call among the statements of the chapter

    def __post_init__(self) -> None:
        self.path = self.solution = NBS / f"{self.chapter}.ipynb"  # chapter 00 answers on its own page
        if (apart := NBS / "solutions" / f"{self.chapter}.ipynb").exists():
            self.solution = apart
        self.all, self.call = statements(self.path), statements(self.path)[self.place].tree.value
        self.check, *self.arguments = (argument.id for argument in self.call.args)
        self.checked = "%jaxtyping.typechecker" in self.path.read_text("utf8")
        self.after = [one for one in self.all[self.place + 1 :] if one.cell == self.all[self.place].cell]

    @cached_property
    def chosen(self) -> list[int]:
        """Places of all statements before the call that it needs."""
        names = {self.check, *self.arguments}.union(*(one.reads for one in self.after))
        return sorted(needed(names, self.place, self.all))

    @cached_property
    def stubs(self) -> list[Statement]:
        """What the reader is to write."""
        return [self.all[i] for i in self.chosen if isinstance(self.all[i].tree, DEFINITIONS)
                and "raise NotImplementedError" in self.all[i].text and not self.all[i].home]

    @cached_property
    def own(self) -> list[Statement]:
        """The stubs, and what reads them: these are run anew for each answer."""
        names, found = {name for stub in self.stubs for name in stub.binds}, []
        for one in (self.all[i] for i in self.chosen):
            if one in self.stubs or one.reads & names:
                names |= one.binds
                found.append(one)
        return found

    @cached_property
    def solution_parts(self) -> tuple[list[Statement], list[Statement]]:
        """The solution's definitions, those that help and constants included, and what they need besides."""
        of, stubs = statements(self.solution), {name for stub in self.stubs for name in stub.binds}
        start = self.place if self.solution == self.path else 0
        solved = {i for i in range(start, len(of)) if of[i].binds & stubs and isinstance(of[i].tree, DEFINITIONS)}
        places = needed(set().union(*(of[i].reads for i in solved)), max(solved), of) | solved
        solved |= {i for i in places if isinstance(of[i].tree, DEFINITIONS) or "".join(of[i].binds).isupper()}
        solved = {i for i in solved if not of[i].home}
        return [of[i] for i in sorted(solved)], [of[i] for i in sorted(places - solved)]

    @cached_property
    def base(self) -> dict:
        """The chapter's names as they are before the stubs."""
        name = f"chapter_{self.path.stem}"
        sys.modules[name] = ModuleType(name)
        space = vars(sys.modules[name])
        space["__builtins__"] = builtins
        execute([self.all[i] for i in self.chosen if self.all[i] not in self.own], space)
        return space

    @cached_property
    def helpers(self) -> dict:
        """What the solution needs beside its definitions."""
        space = {"__name__": f"chapter_{self.path.stem}"}
        execute(self.solution_parts[1], space)
        return {name: space[name] for one in self.solution_parts[1] for name in one.binds if name in space}

    def tools(self, text: str) -> dict:
        """Imports, constants and exported definitions of the chapter that an answer uses."""
        places = needed(names_of(text)[1] - self.base.keys(), self.place, self.all)
        tools = [self.all[i] for i in sorted(places) if isinstance(self.all[i].tree, IMPORTS) or self.all[i].home
                 or "".join(self.all[i].binds).isupper()]
        space = {}
        execute(tools, space)
        return space

    def right(self) -> str:
        """The text of the solution."""
        return "\n\n".join(one.text for one in self.solution_parts[0])

    def answer(self, answer: str | Sequence[tuple[str, str]]) -> str:
        """The text of an answer."""
        if isinstance(answer, str):
            return answer
        text = self.right()
        for old, new in answer:
            assert old in text, f"the solution of {self.chapter} has no {old!r} any more"
            text = text.replace(old, new)
        return text

    def try_out(self, answer: str | None, capsys: pytest.CaptureFixture, times: int = 1) -> list[str]:
        """What the reader is told each time with an answer in the place of the stub, or with the stub."""
        space = {**self.base}
        if answer is not None:
            space |= {**self.tools(answer), **self.helpers}
        execute(self.own, space)
        if answer is not None:
            exec(compiled(answer, "answer", self.checked), space)
        said = []
        for _ in range(times):
            capsys.readouterr()
            check_exercise(*(space[name] for name in (self.check, *self.arguments)))
            said.append(capsys.readouterr().out)
            execute(self.after, space)
        return said


def exercises() -> Iterator[Exercise]:
    """All exercises with a check."""
    for path in sorted([*NBS.glob("*.ipynb"), *NBS.glob("family/*.ipynb")]):
        for place, one in enumerate(statements(path)):
            if isinstance(one.tree, ast.Expr) and ast.unparse(one.tree).startswith("check_exercise("):
                yield Exercise(str(path.relative_to(NBS).with_suffix("")), place)


EXERCISES = {(one.path.name[:2], one.check): one for one in exercises()}


@pytest.fixture(scope="module", autouse=True)
def desk(tmp_path_factory) -> Iterator[Path]:
    """A folder like nbs/, with empty places for what a chapter writes."""
    desk = tmp_path_factory.mktemp("book") / "nbs"
    desk.mkdir()
    for name in ("tests", "results", "detr_nb"):
        (desk.parent / name).symlink_to(ROOT / name)
    kinds, threads = dict(KINDS), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as the chapters that train do
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        yield desk
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.startswith("chapter_")]:
        del sys.modules[name]
    KINDS.clear()
    KINDS.update(kinds)


# --- answers ----------------------------------------------------------------------------------------------------------
Answer = str | Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What readers may write: a right answer that is not the solution (or why there is none), and wrong ones."""

    right: Answer
    wrong: dict[str, Answer]


ANSWERS = {
    ("00", "check_tokens_inside"): Answers(
        right="""
def tokens_inside(memory, box):
    left, top, right, bottom = cxcywh(box)
    x, y = memory.xy[0].unbind(-1)
    return (x > left) & (x < right) & (y > top) & (y < bottom)


def cxcywh(box):
    cx, cy, w, h = box.tolist()
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
""",
        wrong={
            "the box is ignored": [("box[:2]", 'target["boxes"][0, :2]'), ("box[2:]", 'target["boxes"][0, 2:]')],
            "the whole size to each side": [("box[2:] / 2", "box[2:]")],
            "read as corners": """
def tokens_inside(memory, box):
    return ((memory.xy[0] >= box[:2]) & (memory.xy[0] <= box[2:])).all(-1)
""",
            "in one direction": [(".all(-1)", ".any(-1)")],
            "x and y exchanged": [("memory.xy[0]", "memory.xy[0].flip(-1)")],
            "the colour instead of the place": """
def tokens_inside(memory, box):
    return (memory.x[0] - torch.tensor([1.0, 0.6, 0.2])).abs().sum(-1) < 0.1
""",
            "always this grid": """
def tokens_inside(memory, box):
    y, x = (torch.arange(48) // 8 + 0.5) / 6, (torch.arange(48) % 8 + 0.5) / 8
    return ((torch.stack((x, y), -1) - box[:2]).abs() <= box[2:] / 2).all(-1)
""",
        },
    ),
    ("01", "test_weights_to_box"): Answers(
        right="""
def weights_to_box(weights, centres, cell):
    found = []
    for axis in (0, 1):
        mean = sum(w * c[axis] for w, c in zip(weights, centres))
        square = sum(w * c[axis] ** 2 for w, c in zip(weights, centres))
        found.append((mean, (12 * (square - mean**2) + cell[axis] ** 2) ** 0.5))
    (x, w), (y, h) = found
    return torch.stack((x, y, w, h))
""",
        wrong={
            "no cell": [(" + cell**2", "")],
            "cell not squared": [("cell**2", "cell")],
            "cell added outside": [("(12 * variance + cell**2).sqrt()", "(12 * variance).sqrt() + cell")],
            "the cell's sides exchanged": [("cell**2", "cell.flip(0) ** 2")],
            "8 instead of 12": [("12 *", "8 *")],
            "no 12": [("12 * variance", "variance")],
            "one size for all": [("(12 * variance + cell**2).sqrt()", "torch.tensor([0.35, 0.45])")],
            "2 sigma and a cell": [("(12 * variance + cell**2).sqrt()", "2 * variance.sqrt() + cell")],
            "plain mean": [("weights @ centres", "centres.mean(0)")],
            "this grid's centres": """
def weights_to_box(weights, _, cell):
    y, x = (torch.arange(48) // 8 + 0.5) / 6, (torch.arange(48) % 8 + 0.5) / 8
    centres = torch.stack((x, y), -1)
    centre = weights @ centres
    variance = weights @ (centres - centre).square()
    return torch.cat((centre, (12 * variance + cell**2).sqrt()))
""",
        },
    ),
    ("01", "test_causal_bias"): Answers(
        right="""
def causal_bias(n):
    i = torch.arange(n)
    return torch.where(i[None, :] <= i[:, None], 0.0, -1e9)[None, None]
""",
        wrong={
            "not itself": [("triu(1)", "triu(0)")],
            "the later ones": [(".triu(1)", ".tril(-1)")],
            "one too many": [("triu(1)", "triu(2)")],
            "a soft bias": [('float("-inf")', "-1.0")],
            "no bias": """
def causal_bias(n):
    return torch.zeros(1, 1, n, n)
""",
            "always six": [("torch.full((n, n)", "torch.full((6, 6)")],
            "where it may look": """
def causal_bias(n):
    return torch.ones(n, n).tril()[None, None]
""",
        },
    ),
    ("02", "check_shift"): Answers(
        right="""
def shift_matrix(offset, width, temperature=10000):
    matrix = torch.zeros(width, width)
    for j in range(0, width, 2):
        turn = torch.tensor(offset / temperature ** (j / width))
        matrix[j, j] = matrix[j + 1, j + 1] = turn.cos()
        matrix[j, j + 1], matrix[j + 1, j] = turn.sin(), -turn.sin()
    return matrix
""",
        wrong={
            "turned the other way": [
                ("cosines, sines)", "cosines, -sines)"),
                ("(-sines, cosines)", "(sines, cosines)"),
            ],
            "no rotation": [("(-sines, cosines)", "(sines, cosines)")],
            "the usual temperature": [(", width, temperature)", ", width)")],
            "always by two and a half": [("float(offset)", "2.5")],
            "sines first, then cosines": [
                ("torch.block_diag(*blocks)", "torch.block_diag(*blocks)[[*range(0, width, 2), *range(1, width, 2)]]")
            ],
            "one matrix for all": [
                ("(torch.tensor(float(offset)), width, temperature)", "(torch.tensor(2.5), 16, 100)")
            ],
        },
    ),
    ("03", "check_diou"): Answers(
        right="""
def diou(a, b):
    hull = torch.maximum(a, b)[..., 2:] - torch.minimum(a, b)[..., :2]
    apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    return iou(a, b) - (apart**2).sum(-1) / ((hull**2).sum(-1) + 1e-9)
""",
        wrong={
            "no guard": [(".clamp(min=SMALLEST_AREA)", "")],
            "guarded behind the division": [
                ("between / diagonal.clamp(min=SMALLEST_AREA)", "(between / diagonal).nan_to_num(0)")
            ],
            "not squared": [(".square().sum(-1)", ".norm(dim=-1)")],
            "corners instead of centres": [
                ("(xyxy_to_cxcywh(a_xyxy) - xyxy_to_cxcywh(b_xyxy))", "(a_xyxy - b_xyxy)")
            ],
            "added": [(") - between", ") + between")],
            "area of the hull": [("(high - low).square().sum(-1)", "(high - low).prod(-1)")],
            "the diagonal of what they share": [
                ("torch.minimum", "torch.maximum"),
                ("torch.maximum(a_xyxy[..., 2:]", "torch.minimum(a_xyxy[..., 2:]"),
            ],
            "only IoU": [(" - between / diagonal.clamp(min=SMALLEST_AREA)", "")],
        },
    ),
    ("04", "check_arrow"): Answers(
        right="""
def arrow_contour(shaft=0.25):
    s = shaft
    corners = [(-s, -1), (s, -1), (s, -0.2), (1, -0.4), (0, 1), (-1, -0.4), (-s, -0.2)]
    return np.array(corners, dtype=float)[::-1]
""",
        wrong={
            "a house": """
def arrow_contour(shaft=0.25):
    return np.array([[0, 1], [1, 0.2], [1, -0.4], [1, -1], [-1, -1], [-1, -0.4], [-1, 0.2]])
""",
            "a triangle": """
def arrow_contour(shaft=0.25):
    return np.array([[0, 1], [0.4, 0.2], [0.7, -0.4], [1, -1], [-1, -1], [-0.7, -0.4], [-0.4, 0.2]])
""",
            "always this shaft": [("[shaft, 0.1], [shaft, -1.0]", "[0.25, 0.1], [0.25, -1.0]")],
            "half the shaft": [("[shaft, 0.1], [shaft, -1.0]", "[shaft / 2, 0.1], [shaft / 2, -1.0]")],
            "out of order": [("return np", "right = right[[1, 0, 2]]\n    return np")],
            "no way back": [("right[::-1]", "right")],
            "the shaft crosses itself": [("[shaft, -1.0]", "[-shaft, -1.0]")],
            "along x": [("return np.concatenate((", "return np.fliplr(np.concatenate(("), ("(-1, 1)))", "(-1, 1))))")],
            "the tip is below": [("[[0.0, 1.0]]", "[[0.0, -1.0]]")],
        },
    ),
    ("05", "test_quarter_turn"): Answers(
        right="""
def quarter_turn(image, boxes):
    turned = image.transpose(1, 2).flip(2)
    x0, y0, x1, y1 = cxcywh_to_xyxy(boxes).unbind(-1)
    left, right = 1 - y1, 1 - y0
    return turned, torch.stack(((left + right) / 2, (x0 + x1) / 2, right - left, x1 - x0), -1)
""",
        wrong={
            "to the left": [("rot90(-1", "rot90(1"), ("(1 - y, x, ", "(y, 1 - x, ")],
            "the picture to the left": [("rot90(-1", "rot90(1")],
            "the boxes to the left": [("(1 - y, x, ", "(y, 1 - x, ")],
            "boxes stay": [("torch.stack((1 - y, x, height, width), 1)", "boxes")],
            "sizes stay": [("height, width), 1)", "width, height), 1)")],
            "only exchanged": [("(1 - y, x, ", "(y, x, ")],
            "mirrored": [("(1 - y, x, ", "(y, x, "), ("image.rot90(-1, (1, 2))", "image.transpose(1, 2)")],
        },
    ),
    ("06", "check_fold"): Answers(
        right="""
@torch.no_grad()
def fold(conv, norm):
    whole = copy.deepcopy(conv)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    whole.weight = nn.Parameter(torch.einsum("o,oiyx->oiyx", scale, conv.weight))
    whole.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    return whole


import copy
""",
        wrong={
            "no dilation": [("        conv.dilation,\n", "")],
            "no stride": [("conv.stride", "1")],
            "no padding": [("conv.padding", "0")],
            "no epsilon": [(" + norm.eps", "")],
            "variance without its root": [(".sqrt()", "")],
            "the mean is not scaled": [("norm.running_mean * scale", "norm.running_mean")],
            "the mean is forgotten": [(" - norm.running_mean * scale", "")],
            "scaled along the inputs": [("scale[:, None, None, None]", "scale[None, :3, None, None]")],
            "the convolution is changed": """
@torch.no_grad()
def fold(conv, norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    conv.weight *= scale[:, None, None, None]
    conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    return conv
""",
            "two passes": """
def fold(conv, norm):
    return nn.Sequential(conv, norm)
""",
        },
    ),
    ("07", "check_local"): Answers(
        right="""
class Near(MultiHeadAttention):
    def forward(self, x, memory):
        (rows, columns), n = memory.shapes[0], x.shape[1]
        bias = torch.zeros(1, 1, n, n)
        for i in range(n):
            for j in range(n):
                if max(abs(i // columns - j // columns), abs(i % columns - j % columns)) > self.reach:
                    bias[..., i, j] = -1e9
        place = x + memory.pos
        return super().forward(place, place, x, memory.pad, bias)


class Local(EncoderLayer):
    def __init__(self, d, heads, hidden, reach):
        super().__init__(d, heads, hidden, attention=Near(d, heads))
        self.attention.reach = reach
""",
        wrong={
            "padding is seen": [("memory.pad, self.bias", "torch.zeros_like(memory.pad), self.bias")],
            "always 6 x 8": [("y, x = memory.shapes[0]", "y, x = 6, 8")],
            "nearer than reach": [("steps > self.reach", "steps >= self.reach")],
            "steps along rows and columns": [(".amax(-1)", ".sum(-1)")],
            "rows and columns exchanged": [("y, x = memory.shapes[0]", "x, y = memory.shapes[0]")],
            "rows alone": [(".amax(-1)", "[..., 0]")],
            "the far ones": [("steps > self.reach", "steps < self.reach")],
            "everything": [("self.bias(memory)", "None")],
            "positions in the values": [("(place, place, x,", "(place, place, place,")],
        },
    ),
    ("08", "check_start_small"): Answers(
        right="""
def start_small(head, size):
    wanted = torch.full((2,), size)
    head.boxes[-1].bias.data[2:] = torch.logit(wanted)
    head.boxes[-1].weight.data[2:] *= 0.1
""",
        wrong={
            "logarithm": [("math.log(size / (1 - size))", "math.log(size)")],
            "one size for all": [("math.log(size / (1 - size))", "-2.2")],
            "no sigmoid": [("math.log(size / (1 - size))", "size")],
            "upside down": [("size / (1 - size)", "(1 - size) / size")],
            "all four": [("bias[2:]", "bias[:]")],
            "the centre": [("bias[2:]", "bias[:2]")],
            "the width alone": [("bias[2:]", "bias[2:3]")],
            "the wrong layer": [("boxes[-1]", "boxes[0]")],
        },
    ),
    ("09", "check_match_many"): Answers(
        right="""
def match_many(cost, k):
    query, copy = assign(np.repeat(cost, k, axis=1))
    return query, copy // k
""",
        wrong={
            "tile, divided by k": [("copy % cost.shape[1]", "copy // k")],
            "repeat, modulo the targets": [("np.tile(cost, (1, k))", "np.repeat(cost, k, axis=1)")],
            "the k cheapest of each target": """
def match_many(cost, k):
    query = torch.from_numpy(np.argsort(cost, 0)[:k].T.flatten())
    return query, torch.arange(cost.shape[1]).repeat_interleave(k)
""",
            "greed": """
def match_many(cost, k):
    free, query = list(range(len(cost))), []
    for target in np.repeat(range(cost.shape[1]), k):
        query.append(min(free, key=lambda q: cost[q, target]))
        free.remove(query[-1])
    return torch.tensor(query), torch.arange(cost.shape[1]).repeat_interleave(k)
""",
            "k is ignored": [("(1, k)", "(1, 1)")],
            "always three": [("(1, k)", "(1, 3)")],
            "the first queries": """
def match_many(cost, k):
    target = torch.arange(cost.shape[1]).repeat_interleave(k)
    return torch.arange(len(target)), target
""",
            "round after round": """
def match_many(cost, k):
    cost, found = cost.copy(), []
    for _ in range(k):
        query, target = assign(cost)
        cost[query] = 1e6
        found.append((query, target))
    return torch.cat([q for q, _ in found]), torch.cat([t for _, t in found])
""",
        },
    ),
    ("10", "check_focal_loss"): Answers(
        right="""
def focal_loss(logits, labels, alpha=0.25, gamma=2.0):
    yes = (labels[:, None] == torch.arange(logits.shape[1])).float()
    loss = F.binary_cross_entropy_with_logits(logits, yes, reduction="none")
    missed = (yes - logits.sigmoid()).abs()
    return ((yes * alpha + (1 - yes) * (1 - alpha)) * missed**gamma * loss).sum()
""",
        wrong={
            "logarithms of probabilities": [
                ("F.logsigmoid(signed)", "torch.where(yes, p.log(), (1 - p).log())")
            ],
            "half safe": [("F.logsigmoid(signed)", "torch.where(yes, p.log(), F.logsigmoid(-logits))")],
            "a small number in the logarithm": [
                ("F.logsigmoid(signed)", "torch.where(yes, p, 1 - p).add(1e-6).log()")
            ],
            "alpha as usual": [("alpha * (1 - p)", "0.25 * (1 - p)"), ("(1 - alpha)", "0.75")],
            "gamma as usual": [("**gamma", "** 2.0")],
            "alpha exchanged": [("alpha * (1 - p)", "(1 - alpha) * (1 - p)"), ("(1 - alpha) * p**", "alpha * p**")],
            "mean": [(").sum()", ").mean()")],
            "the objects alone": [("(1 - alpha) * p**gamma)", "0.0 * p)")],
            "no alpha for the others": [("(1 - alpha) * p**gamma", "p**gamma")],
            "the sign": [("return -(", "return (")],
        },
    ),
    ("11", "check_bootstrap"): Answers(
        right="""
def bootstrap_ap50(targets, detections, classes, times):
    found = []
    for _ in range(times):
        drawn = random.choices(list(zip(targets, detections)), k=len(targets))
        one, two = (list(part) for part in zip(*drawn))
        found.append(np.nanmean(ap_table(one, two, classes, np.array([0.5]))))
    return np.array(found)


import random
""",
        wrong={
            "half of them, without replacement": [
                ("rng.integers(0, len(targets), len(targets))",
                 "rng.choice(len(targets), (len(targets) + 1) // 2, replace=False)")
            ],
            "without replacement": [("rng.integers(0, len(targets), len(targets))", "rng.permutation(len(targets))")],
            "not an AP": """
def bootstrap_ap50(targets, detections, classes, times):
    return np.random.default_rng(0).normal(0.5, 0.03, times).clip(0, 1)
""",
            "all thresholds": [("            COCO_THRESHOLDS[:1],\n", "")],
            "truth and answers drawn apart": [
                ("[detections[i] for i in drawn]",
                 "[detections[i] for i in rng.integers(0, len(targets), len(targets))]"),
            ],
            "the same drawing every time": [
                ("    for _ in range(times):\n",
                 "    for _ in range(times):\n        rng = np.random.default_rng(0)\n"),
            ],
            "one image too few": [("len(targets), len(targets))", "len(targets), len(targets) - 1)")],
            "never the last": [("(0, len(targets), ", "(0, max(1, len(targets) - 1), ")],
        },
    ),
    ("12", "check_half_rate_step"): Answers(
        right="""
def half_rate_step(steps):
    return 0.515 * steps
""",
        wrong={
            "half of the run": """
def half_rate_step(steps):
    return steps / 2
""",
            "on the way up": """
def half_rate_step(steps):
    return 0.015 * steps
""",
            "half of what is left, from the start": """
def half_rate_step(steps):
    return (1 - 0.03) * steps / 2
""",
            "for one length": """
def half_rate_step(steps):
    return 2575
""",
        },
    ),
    ("12", "check_step_factor"): Answers(
        right="""
def step_factor(progress):
    return 0.1 ** int(progress >= 2 / 3)
""",
        wrong={
            "after a half": [("2 / 3", "1 / 2")],
            "twice": """
def step_factor(progress):
    return 0.1 ** int(progress * 3)
""",
            "a hundredth": [("else 0.1", "else 0.01")],
            "at the other end": [("2 / 3", "1 / 3")],
            "a warm-up": """
def step_factor(progress):
    return 0.1 if progress >= 2 / 3 else min(1, progress / 0.03)
""",
            "exchanged": [("1.0 if progress <", "1.0 if progress >")],
            "along a line": """
def step_factor(progress):
    return 1 - 0.9 * progress
""",
        },
    ),
    ("12", "check_resume"): Answers(
        right="""
def resume(keep_moments):
    model = detr_tiny(num_classes=3)
    model.load_state_dict(trained.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    if keep_moments:
        optimizer.load_state_dict(deepcopy(old.state_dict()))
    totals = []
    for _ in range(5):
        losses = train_step(model, criterion, optimizer, batch, clip=0.1)
        totals.append(losses["total"].item())
    return totals
""",
        wrong={
            "always a new optimiser": [("if keep_moments", "if False")],
            "exchanged": [("if keep_moments", "if not keep_moments")],
            "four steps": [("range(5)", "range(4)")],
            "no step": """
def resume(keep_moments):
    return [1.0] * 5
""",
        },
    ),
    ("13", "check_attention_distance"): Answers(
        right="""
def attention_distance(weights, xy):
    apart = (xy[:, None] - xy[None]).square().sum(-1).sqrt()
    return torch.einsum("...ij,ij->...i", weights, apart)
""",
        wrong={
            "summed over who looks": [(".sum(-1)", ".sum(-2)")],
            "not weighted": [
                ("(weights * torch.cdist(xy, xy)).sum(-1)", "torch.cdist(xy, xy).mean(-1).expand(weights.shape[:-1])"),
            ],
            "mean of the products": [(".sum(-1)", ".mean(-1)")],
            "squared": [("torch.cdist(xy, xy)", "torch.cdist(xy, xy).square()")],
            "steps along the sides": [("torch.cdist(xy, xy)", "torch.cdist(xy, xy, p=1)")],
            "to the mean place": """
def attention_distance(weights, xy):
    return (weights @ xy - xy).norm(dim=-1)
""",
            "to the strongest": """
def attention_distance(weights, xy):
    return (xy[weights.argmax(-1)] - xy).norm(dim=-1)
""",
        },
    ),
    ("14", "check_to_official"): Answers(
        right="""
def to_official(model):
    ours, written = model.state_dict(), {}
    for name in list(weights):
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            kind = name.rpartition("_")[2]
            near = name.replace("multihead_attn", "cross.attention").replace("self_attn", "attention")
            near = near.removeprefix("transformer.").rpartition(".")[0]
            written[name] = torch.cat([ours[f"{near}.{part}.{kind}"] for part in "qkv"])
    return {**back(ours), **written}


def back(ours):
    found = {}
    for name, value in ours.items():
        if re.search(r"attention\\.[qkv]\\.", name):
            continue
        for old, new in (
            ("memory.backbone.body.", "backbone.0.body."), ("memory.project.", "input_proj."),
            ("queries.embedding.", "query_embed."), ("decoder.head.classes.", "class_embed."),
            ("decoder.head.boxes.0.", "bbox_embed.layers.0."), ("decoder.head.boxes.2.", "bbox_embed.layers.1."),
            ("decoder.head.boxes.4.", "bbox_embed.layers.2."), ("attention_step.norm.", "norm1."),
            ("cross_step.norm.", "norm2."),
            ("feed_step.norm.", "norm2." if name.startswith("encoder") else "norm3."),
            ("cross.attention.", "multihead_attn."), (".attention.", ".self_attn."), (".out.", ".out_proj."),
            ("feed_forward.0.", "linear1."), ("feed_forward.3.", "linear2."),
        ):
            name = name.replace(old, new)
        found["transformer." * name.startswith(("encoder", "decoder")) + name] = value
    return found


import re
""",
        wrong={
            "our names": """
def to_official(model):
    return model.state_dict()
""",
            "maps in another order": [('part in "qkv"', 'part in "kqv"')],
            "norms exchanged": [('".norm1."', '".norm0."'), ('".norm2."', '".norm1."'), ('".norm0."', '".norm2."')],
            "the decoder's last norm as in the encoder": [(r'r"\1.norm3."', r'r"\1.norm2."')],
            "the maps stay three": [("state.pop(re.sub", "state.get(re.sub")],
            "no prefix": [('r"transformer.\\1coder."', 'r"\\1coder."')],
            "fresh weights": [("state = model.state_dict()", "state = small_detr().state_dict()")],
        },
    ),
    ("16", "check_flipped_share"): Answers(
        right="""
def flipped_share(out, targets):
    only, count = 0, 0
    for row, target in zip(out.boxes[-1], targets):
        for box in target["boxes"]:
            away = box * torch.tensor([-1.0, 1, 1, 1]) + torch.tensor([1.0, 0, 0, 0])
            as_is, mirrored = (pairwise_iou(cxcywh_to_xyxy(row), cxcywh_to_xyxy(b[None])).max() for b in (box, away))
            only, count = only + bool(mirrored >= 0.5 > as_is), count + 1
    return only / count


from detr_nb.boxes import cxcywh_to_xyxy, pairwise_iou
""",
        wrong={
            "what is not found": """
def flipped_share(out, targets):
    return 1 - found_share(out.boxes[-1], targets, [(1, 1)] * len(targets))
""",
            "found if mirrored": [("after & ~before", "after")],
            "found in either way": [("after & ~before", "after | before")],
            "up and down": [
                ("(1 - boxes[..., :1], boxes[..., 1:])", "(boxes[..., :1], 1 - boxes[..., 1:2], boxes[..., 2:])")
            ],
            "both directions": [("(1 - boxes[..., :1], boxes[..., 1:])", "(1 - boxes[..., :2], boxes[..., 2:])")],
            "the first layer": [("out.boxes[-1]", "out.boxes[0]")],
            "share of the predictions": [(".any(0)", ".any(1)")],
            "mean over images": [
                ("float(torch.cat(only).float().mean())",
                 "float(torch.stack([o.float().mean() for o in only]).mean())"),
            ],
            "nothing": """
def flipped_share(out, targets):
    return 0.0
""",
        },
    ),
    ("17", "check_sure"): Answers(
        right="""
def sure(fast, slow, draws=1000):
    wins = 0
    for _ in range(draws):
        first, second = (statistics.median(random.choices(list(times), k=len(times))) for times in (fast, slow))
        wins += first < second
    return wins / draws


import random, statistics
""",
        wrong={
            "means": [("np.median(", "np.mean(")],
            "single pairs": [("(draws, len(times))", "(draws, 1)")],
            "all pairs": """
def sure(fast, slow, draws=1000):
    return float((np.array(fast)[:, None] < np.array(slow)).mean())
""",
            "the medians alone": """
def sure(fast, slow, draws=1000):
    return float(np.median(fast) < np.median(slow))
""",
            "without replacement": [("(times, (draws, len(times)))", "(times, (draws, 1))")],
            "shuffled": [
                ("dice.choice(times, (draws, len(times)))", "dice.permuted(np.tile(times, (draws, 1)), axis=1)"),
            ],
            "exchanged": [("first < second", "second < first")],
            "not larger": [("first < second", "first <= second")],
            "always a thousand": [("(draws, len(times))", "(1000, len(times))")],
        },
    ),
    ("18", "check_describe"): Answers(
        right="""
def describe_command(options):
    model = pretrained_model(options.weights)
    print(model_config(model))
    return 0


from detr_nb.hub import model_config
""",
        wrong={
            "nothing is printed": """
def describe_command(options):
    return 0
""",
            "no code": [("    return 0", "    return None")],
            "the carried model": [("pretrained_model(options.weights)", "pretrained_model()")],
            "no preparation": [
                ("model_config(pretrained_model(options.weights)).items()",
                 '[p for p in model_config(pretrained_model(options.weights)).items() if "preprocess" not in p[0]]')
            ],
            "no architecture": """
def describe_command(options):
    model = pretrained_model(options.weights)
    print(model.num_classes, model.preprocess)
    return 0
""",
            "a failure's code": [("    return 0", "    return 1")],
        },
    ),
    ("19", "check_threshold"): Answers(
        right="""
def threshold_for(targets, detections, label, precision):
    values, _, scores = pr_curve(targets, detections, label)
    lowest = float("inf")
    for value, score in zip(values, scores):
        if value >= precision:
            lowest = min(lowest, float(score))
    return lowest
""",
        wrong={
            "the first good place": [("good[-1]", "good[0]")],
            "more than wanted": [("values >= precision", "values > precision")],
            "the best score of all": [("scores[good[-1]]", "scores[0]")],
            "one place further": [("scores[good[-1]]", "scores[min(good[-1] + 1, len(scores) - 1)]")],
            "zero if there is none": [('float("inf")', "0.0")],
            "an error if there is none": [(' if len(good) else float("inf")', "")],
            "recall": [("values, _, scores", "_, values, scores")],
            "always class 1": [("detections, label)", "detections, 1)")],
            "all classes as one": """
def threshold_for(targets, detections, label, precision):
    targets = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
    detections = [{**d, "labels": torch.zeros_like(d["labels"])} for d in detections]
    values, _, scores = pr_curve(targets, detections, 0)
    good = np.flatnonzero(values >= precision)
    return float(scores[good[-1]]) if len(good) else float("inf")
""",
            "while it is good": """
def threshold_for(targets, detections, label, precision):
    values, _, scores = pr_curve(targets, detections, label)
    lowest = float("inf")
    for value, score in zip(values, scores):
        if value < precision:
            break
        lowest = float(score)
    return lowest
""",
        },
    ),
    ("20", "check_merge_classes"): Answers(
        right="""
def merge_classes(model, groups):
    old = model.decoder.head.classes
    mixing = torch.zeros(len(groups), len(old.weight))
    for row, group in zip(mixing, groups):
        for one in group:
            row[one] += 1 / len(group)
    rows, bias = mixing @ old.weight.detach(), mixing @ old.bias.detach()
    replace_head(model, len(groups))
    with torch.no_grad():
        model.decoder.head.classes.weight[:-1] = rows
        model.decoder.head.classes.bias[:-1] = bias
    return model
""",
        wrong={
            "sums": [(".mean(0)", ".sum(0)")],
            "the first of each group": [("[group].mean(0)", "[group[0]]")],
            "no bias": [("        head.bias[new] = old.bias[group].mean(0)\n", "")],
            "a copy": [("    return model", "    return deepcopy(model)")],
            "no-object is a mean, too": [
                ("    return model", "    head.weight[-1] = old.weight.mean(0)\n    return model")
            ],
            "the rows of the new head": [
                ("deepcopy(model.decoder.head.classes)", "replace_head(model, 6).decoder.head.classes"),
            ],
            "over the width": [("old.weight[group].mean(0)", "old.weight[group].mean()")],
        },
    ),
    ("21", "check_detections"): Answers(
        right="""
def detections(logits, boxes, height, width, least):
    found = []
    for row, (x, y, w, h) in zip(logits.astype(float), boxes.astype(float)):
        shares = np.exp(row) / np.exp(row).sum()
        label = int(shares[:-1].argmax())
        if shares[label] >= least:
            corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            found.append((shares[label], label, corners))
    found.sort(key=lambda one: -one[0])
    scores, labels, corners = zip(*found)
    return np.array(scores), np.array(labels), np.array(corners)
""",
        wrong={
            "softmax without no-object": [
                ("np.exp(logits - logits.max(1, keepdims=True))", "np.exp(logits[:, :-1])"),
                ("keepdims=True))[:, :-1]", "keepdims=True))"),
            ],
            "where no-object is best there is nothing": [
                ("order = order[scores[order] >= least]",
                 "order = order[(scores[order] >= least) & (logits.argmax(1)[order] < 6)]")
            ],
            "no-object is a label": [("keepdims=True))[:, :-1]", "keepdims=True))")],
            "not sorted": [("np.argsort(-scores)", "np.arange(len(scores))")],
            "worst first": [("np.argsort(-scores)", "np.argsort(scores)")],
            "height and width exchanged": [("[width, height, width, height]", "[height, width, height, width]")],
            "shares": [("    corners = corners * np.array([width, height, width, height])\n", "")],
            "centres": [("np.concatenate((centre - half, centre + half), 1)", "boxes")],
            "the whole size to each side": [("boxes[:, 2:] / 2", "boxes[:, 2:]")],
            "no threshold": [("    order = order[scores[order] >= least]\n", "")],
            "always this threshold": [(">= least", ">= 0.5")],
        },
    ),
    ("22", "check_mirrored"): Answers(
        right="""
@dataclass(frozen=True)
class Mirrored(Damaged):
    def damage(self, target):
        boxes = target["boxes"].clone()
        boxes[:, 0] = 1 - boxes[:, 0]
        return {**target, "boxes": boxes}
""",
        wrong={
            "in place": """
@dataclass(frozen=True)
class Mirrored(Damaged):
    def damage(self, target):
        target["boxes"][:, 0] = 1 - target["boxes"][:, 0]
        return target
""",
            "upside down": [
                ('x, rest = target["boxes"][:, :1], target["boxes"][:, 1:]',
                 'x, y, rest = target["boxes"].split((1, 1, 2), 1)'),
                ("(1 - x, rest)", "(x, 1 - y, rest)"),
            ],
            "minus": [("1 - x", "-x")],
            "all four numbers": [("torch.cat((1 - x, rest), 1)", '1 - target["boxes"]')],
            "boxes and labels alone": [
                ('{**target, "boxes": torch.cat((1 - x, rest), 1)}',
                 '{"labels": target["labels"], "boxes": torch.cat((1 - x, rest), 1)}'),
            ],
            "nothing is damaged": [("1 - x", "x")],
            "the order of the boxes": [("torch.cat((1 - x, rest), 1)", 'target["boxes"].flip(0)')],
        },
    ),
    ("80", "check_changes"): Answers(
        right="""
def changes(old, new):
    before, after = old.flat(), new.flat()
    lines = []
    for name in dict.fromkeys([*before, *after]):
        one, two = before.get(name), after.get(name)
        if one != two:
            lines.append(f"{name}: {one} -> {two}")
    return lines
""",
        wrong={
            "the names of the first alone": [("before.keys() | after.keys()", "before.keys()")],
            "the names of both": [("before.keys() | after.keys()", "before.keys() & after.keys()")],
            "the wrong way round": [
                ("{before.get(name)} -> {after.get(name)}", "{after.get(name)} -> {before.get(name)}")
            ],
            "everything": [("if before.get(name) != after.get(name)", "if True")],
            "the outer names": [("old.flat(), new.flat()", "vars(old), vars(new)")],
            "as code": [("{before.get(name)} -> {after.get(name)}", "{before.get(name)!r} -> {after.get(name)!r}")],
        },
    ),
    ("81", "check_seal"): Answers(
        right="""
def seal(words):
    text = json.dumps({k: words[k] for k in words if k != "seal"}, sort_keys=True)
    return dict(words, seal=hashlib.sha256(text.encode()).hexdigest())


def broken(words):
    return "seal" not in words or seal(words)["seal"] != words["seal"]
""",
        wrong={
            "the order counts": [(", sort_keys=True", "")],
            "Python's hash": [
                ("hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()", "str(hash(str(rest)))")
            ],
            "the outer names": [("json.dumps(rest, sort_keys=True)", '" ".join(sorted(rest))')],
            "a missing seal is no fault": [
                ('words.get("seal") != digest', 'words.get("seal", digest(words)) != digest'),
            ],
            "the words are changed": [
                ('return {**words, "seal": digest(words)}', 'words["seal"] = digest(words)\n    return words'),
            ],
            "never broken": [('words.get("seal") != digest(words)', "False")],
            "always broken": [('words.get("seal") != digest(words)', "True")],
            "the seal belongs to the sealed": [(' if name != "seal"', "")],
            "the seal alone": [('{**words, "seal": digest(words)}', '{"seal": digest(words)}')],
        },
    ),
    ("82", "test_near_duplicates"): Answers(
        right="""
def near_duplicates(boxes_xyxy, classes, least=0.9):
    found = []
    for i in range(len(classes)):
        for j in range(i + 1, len(classes)):
            if classes[i] == classes[j] and pairwise_iou(boxes_xyxy[[i]], boxes_xyxy[[j]]) >= least:
                found.append((i, j))
    return found
""",
        wrong={
            "the class is ignored": [("near & same.reshape(near.shape)", "near")],
            "each pair twice": [(".triu(1)", "")],
            "with itself": [(".triu(1)", ".triu(0)")],
            "the larger number first": [(".triu(1)", ".tril(-1)")],
            "more than least": [(">= least", "> least")],
            "least is ignored": [(">= least", ">= 0.9")],
            "neighbours alone": """
def near_duplicates(boxes_xyxy, classes, least=0.9):
    near = pairwise_iou(boxes_xyxy, boxes_xyxy) >= least
    return [(i, i + 1) for i in range(len(classes) - 1) if near[i, i + 1] and classes[i] == classes[i + 1]]
""",
            "equal ones": [
                ("pairwise_iou(boxes_xyxy, boxes_xyxy) >= least", "(boxes_xyxy[:, None] == boxes_xyxy).all(-1)"),
            ],
        },
    ),
    ("83", "check_unused"): Answers(
        right="""
def unused_files(folder, series):
    keep = [series_key(one) for one in series]
    found = []
    for file in folder.iterdir():
        key = len(file.stem) == 16 and set(file.stem) <= set("0123456789abcdef")
        if key and file.suffix in (".npy", ".pt") and file.stem not in keep:
            found.append(file)
    return sorted(found)
""",
        wrong={
            "the images alone": [("(npy|pt)", "npy")],
            "files of other people": [("[0-9a-f]{16}", ".*")],
            "those in use": [("file.stem not in used", "file.stem in used")],
            "everything of ours": [(" and file.stem not in used", "")],
            "deleted": [("        file\n        for", "        (file, file.unlink())[0]\n        for")],
            "names": [("        file\n        for", "        Path(file.name)\n        for")],
            "the same description is in use": [
                ("{series_key(scenes) for scenes in series}",
                 "{series_key(Scenes(one.config, 3, *rest)) for one in series for rest in ((0,), (1,), (0, True))}")
            ],
        },
    ),
    ("84", "test_balanced_order"): Answers(
        right="""
def balanced_order(labels, count, seed, epoch):
    generator = torch.Generator().manual_seed(100_003 * seed + epoch)
    weights = 1 / (labels[:, None] == labels).sum(1).double()
    return torch.multinomial(weights, count, replacement=True, generator=generator)
""",
        wrong={
            "images alike": [(", p=chances", "")],
            "a stream of Python's": [("np.random.default_rng((seed, epoch, 2))", "np.random")],
            "torch's stream": """
def balanced_order(labels, count, seed, epoch):
    weights = 1 / (labels[:, None] == labels).sum(1).double()
    return torch.multinomial(weights, count, replacement=True)
""",
            "the epoch is ignored": [("(seed, epoch, 2)", "(seed, 2)")],
            "the seed is ignored": [("(seed, epoch, 2)", "(epoch, 2)")],
            "seed and epoch exchangeable": [("(seed, epoch, 2)", "seed + epoch")],
            "one image a class": """
def balanced_order(labels, count, seed, epoch):
    generator = np.random.default_rng((seed, epoch, 2))
    first = np.array([int((labels == c).nonzero()[0]) for c in labels.unique()])
    return torch.from_numpy(generator.choice(first, count))
""",
            "classes from 0 on": [
                ("np.unique(labels.numpy(), return_inverse=True, return_counts=True)",
                 "None, labels.numpy(), np.bincount(labels.numpy())")
            ],
            "count is ignored": [("count, p", "6000, p")],
        },
    ),
    ("85", "check_yolo_text"): Answers(
        right="""
def yolo_text(target, category_ids):
    lines = []
    for label, (x, y, w, h) in zip(target["labels"], target["boxes"]):
        lines.append("%d %.6f %.6f %.6f %.6f" % (category_ids[int(label)], x, y, w, h))
    return "\\n".join(lines)
""",
        wrong={
            "labels": [("category_ids[label]", "label")],
            "numbers from 1": [("category_ids[label]", "label + 1")],
            "the number of the row": [("for label, box in rows", "for label, (_, box) in enumerate(rows)")],
            "corner and size": [
                ('target["boxes"].tolist()', "corner.tolist()"),
                ("    rows = ",
                 '    corner = target["boxes"].clone()\n    corner[:, :2] -= corner[:, 2:] / 2\n    rows = '),
            ],
            "three digits": [(":.6f", ":.3f")],
            "a word where nothing is": [("    return ", "    return 'nothing' if not len(target['labels']) else ")],
            "all in one line": [("\\n", " ")],
            "commas": [("' '.join", "','.join")],
        },
    ),
    ("86", "check_goes_on_from"): Answers(
        right="""
def goes_on_from():
    return 600
""",
        wrong={
            "where the power failed": """
def goes_on_from():
    return 700
""",
            "the next one": """
def goes_on_from():
    return 900
""",
            "the first one": """
def goes_on_from():
    return 300
""",
            "from the start": """
def goes_on_from():
    return 0
""",
            "seconds": """
def goes_on_from():
    return 120
""",
        },
    ),
    ("86", "check_stop_early"): Answers(
        right="""
class StopEarly(Callback):
    def __init__(self, patience):
        self.patience = patience

    def after_step(self, run, losses):
        best, rows = float("inf"), 0
        for row in run.history:
            rows = 0 if row["total"] < best else rows + 1
            best = min(best, row["total"])
        if rows >= self.patience:
            run.stopping = True
""",
        wrong={
            "one row too late": [(">= self.patience", "> self.patience")],
            "one row too early": [(">= self.patience", ">= self.patience - 1")],
            "the last of equal ones is best": [("totals.index(min(totals", "totals[::-1].index(min(totals")],
            "compared with the row before": """
class StopEarly(Callback):
    def __init__(self, patience):
        self.patience = patience

    def after_step(self, run, losses):
        totals, rows = [row["total"] for row in run.history], 0
        for one, two in zip(totals, totals[1:]):
            rows = 0 if two < one else rows + 1
        if rows >= self.patience:
            run.stopping = True
""",
            "steps instead of rows": """
class StopEarly(Callback):
    def __init__(self, patience):
        self.patience, self.best, self.bad = patience, float("inf"), 0

    def after_step(self, run, losses):
        if not run.history:
            return
        total = run.history[-1]["total"]
        self.bad = 0 if total < self.best else self.bad + 1
        self.best = min(self.best, total)
        if self.bad >= self.patience:
            run.stopping = True
""",
            "never counted anew": """
class StopEarly(Callback):
    def __init__(self, patience):
        self.patience = patience

    def after_step(self, run, losses):
        best, bad = float("inf"), 0
        for row in run.history:
            bad += row["total"] >= best
            best = min(best, row["total"])
        if bad >= self.patience:
            run.stopping = True
""",
            "never": """
class StopEarly(Callback):
    def __init__(self, patience):
        self.patience = patience

    def after_step(self, run, losses):
        pass
""",
            "another's order to stop is lifted": """
class StopEarly(Callback):
    def __init__(self, patience):
        self.patience = patience

    def after_step(self, run, losses):
        totals = [row["total"] for row in run.history]
        since = len(totals) - 1 - totals.index(min(totals)) if totals else 0
        run.stopping = since >= self.patience
""",
            "no row yet": """
class StopEarly(Callback):
    def __init__(self, patience):
        self.patience = patience

    def after_step(self, run, losses):
        totals = [row["total"] for row in run.history]
        if len(totals) - 1 - totals.index(min(totals)) >= self.patience:
            run.stopping = True
""",
        },
    ),
    ("87", "check_box_losses"): Answers(
        right="""
def box_losses():
    return 1.1, 1.5
""",
        wrong={
            "exchanged": """
def box_losses():
    return 1.5, 1.1
""",
            "the sums": """
def box_losses():
    return 11.0, 5.5
""",
            "divided by the images": """
def box_losses():
    return 11 / 4, (2 + 9) / 2 / 2
""",
        },
    ),
    ("87", "check_finite_mean"): Answers(
        right="""
def finite_mean(losses):
    total, count = 0.0, 0
    for loss in losses:
        if abs(loss) < float("inf"):
            total, count = total + loss, count + 1
    return total / count if count else None
""",
        wrong={
            "infinity is kept": [("math.isfinite(loss)", "not math.isnan(loss)")],
            "divided by all": [("/ len(finite)", "/ len(losses)")],
            "zero if there is none": [("else None", "else 0.0")],
            "an error if there is none": [(" if finite else None", "")],
            "minus infinity is kept": [("math.isfinite(loss)", "loss < math.inf")],
            "the sum": [("sum(finite) / len(finite)", "sum(finite)")],
            "zeros in their place": [
                ("[loss for loss in losses if math.isfinite(loss)]",
                 "[loss if math.isfinite(loss) else 0.0 for loss in losses]"),
            ],
        },
    ),
    ("88", "check_fetched_names"): Answers(
        right="""
def fetched_names(data):
    names, texts, memo = set(), [], {}
    for code, argument, _ in pickletools.genops(data):
        if code.name == "GLOBAL":
            names.add(argument.replace(" ", "."))
        elif code.name == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]))
        elif code.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else ""
        elif "PUT" in code.name:
            memo[argument] = texts[-1] if texts else ""
        elif "GET" in code.name:
            texts.append(memo.get(argument, ""))
        elif isinstance(argument, str):
            texts.append(argument)
    return names


import pickletools
""",
        wrong={
            "it is opened": """
def fetched_names(data):
    pickle.loads(data)
    return {"argparse.Namespace"}
""",
            "opened, and noted": [("return Nothing", "return super().find_class(module, name)")],
            "the old instruction alone": """
def fetched_names(data):
    return {a.replace(" ", ".") for code, a, _ in pickletools.genops(data) if code.name == "GLOBAL"}


import pickletools
""",
            "the last two texts, without the memory": """
def fetched_names(data):
    names, texts = set(), []
    for code, argument, _ in pickletools.genops(data):
        if code.name == "GLOBAL":
            names.add(argument.replace(" ", "."))
        elif code.name == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]))
        elif isinstance(argument, str):
            texts.append(argument)
    return names


import pickletools
""",
            "a search in the text": """
def fetched_names(data):
    found = {"posix.mkdir", "posix.rmdir", "argparse.Namespace"}
    return {name for name in found if all(part.encode() in data for part in name.split("."))}
""",
            "modules": [('f"{module}.{name}"', "module")],
            "the first one": [("self.names.add(", "self.names or self.names.add(")],
        },
    ),
    ("89", "check_as_flags"): Answers(
        right="""
def as_flags(config):
    flags = {name: value if type(value) is str else json.dumps(value) for name, value in config.flat().items()}
    return [f"--{name}={text}" for name, text in flags.items()]
""",
        wrong={
            "Python's texts": [("json.dumps(value)", "str(value)")],
            "texts in quotes": [("value if isinstance(value, str) else json.dumps(value)", "json.dumps(value)")],
            "defaults left out": [
                ("        words +=", "        words += [] if Toy().flat().get(name) == value else")
            ],
            "None left out": [("        words +=", "        words += [] if value is None else")],
            "kinds left out": [("        words +=", '        words += [] if name == "trunk" else')],
            "from the inside out": [("config.flat().items()", "reversed(config.flat().items())")],
            "the outer names": [("config.flat()", "config.plain()")],
            "one word for both": [('f"--{name}", value', 'f"--{name} {value}", value')],
        },
    ),
    ("94", "check_with_film"): Answers(
        right="""
def with_film(order, start):
    seconds = [COSTS[way] if call < start else 2 * COSTS[way] for call, way in enumerate(order)]
    return {way: [s for s, w in zip(seconds, order) if w == way] for way in COSTS}
""",
        wrong={
            "one call too late": [("call >= start", "call > start")],
            "one call alone": [("call >= start", "call == start")],
            "before the film": [("call >= start", "call < start")],
            "calls counted for each way": [("call >= start", "len(times[way]) >= start")],
            "one after the other": [("enumerate(order)", 'enumerate(sorted(order))')],
            "one cost": [("COSTS[way]", "1.0")],
            "twice as fast": [("2 if call", "0.5 if call")],
        },
    ),
    ("96", "check_moved_share"): Answers(
        right="""
def moved_share(peer, batch):
    flat = torch.nn.utils.parameters_to_vector
    before = flat(peer.model.parameters()).detach().clone()
    training_step(peer, batch)()
    return float((flat(peer.model.parameters()) != before).double().mean())
""",
        wrong={
            "what may learn": """
def moved_share(peer, batch):
    sizes = [(p.numel(), p.requires_grad) for p in peer.model.parameters()]
    return sum(n for n, learns in sizes if learns) / sum(n for n, _ in sizes)
""",
            "share of the tensors": [
                ("sum(int((old != new).sum()) for old, new in pairs)",
                 "sum(int((old != new).any()) for old, new in pairs)"),
                ("sum(old.numel() for old, _ in pairs)", "len(pairs)"),
            ],
            "no copies": [("p.detach().clone()", "p.detach()")],
            "no step": [("    training_step(peer, batch)()\n", "")],
            "share of what may learn": [("for old, _ in pairs)", "for old, p in pairs if p.requires_grad)")],
            "what stays": [("old != new", "old == new")],
            "what has a gradient": """
def moved_share(peer, batch):
    peer.loss(batch).backward()
    parts = list(peer.model.parameters())
    return sum(p.numel() for p in parts if p.grad is not None) / sum(p.numel() for p in parts)
""",
        },
    ),
    ("97", "check_whole_rows"): Answers(
        right="""
def whole_rows(text):
    rows, lines = [], text.split("\\n")
    for number in range(len(lines) - 1):
        if not lines[number]:
            continue
        try:
            rows.append(json.loads(lines[number]))
        except ValueError as error:
            raise ValueError(f"line {number + 1}: {error}") from error
    return rows


import json
""",
        wrong={
            "the cut line is read": """
def whole_rows(text):
    return [json.loads(line) for line in text.splitlines() if line]


import json
""",
            "what cannot be read is left out": """
def whole_rows(text):
    rows = []
    for line in text.split("\\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            pass
    return rows


import json
""",
            "the last line is always left out": """
def whole_rows(text):
    return [json.loads(line) for line in text.splitlines()[:-1] if line]


import json
""",
            "no number in the message": """
def whole_rows(text):
    return [json.loads(line) for line in text.split("\\n")[:-1] if line]


import json
""",
        },
    ),
    ("30", "check_offset_to"): Answers(
        right="""
def offset_to(start, goal, eps=1e-5):
    logit = lambda x: (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
    said = logit(goal)
    said[:, : start.shape[1]] -= logit(start)
    return said
""",
        wrong={
            "a difference of shares": """
def offset_to(start, goal, eps=1e-5):
    return goal - F.pad(start, (0, 4 - start.shape[-1]))
""",
            "the other way": [("inverse_sigmoid(goal, eps) - F", "-inverse_sigmoid(goal, eps) + F")],
            "the whole goal": """
def offset_to(start, goal, eps=1e-5):
    return inverse_sigmoid(goal, eps)
""",
            "sizes of a point count from zero": [
                ("F.pad(base, (0, 4 - base.shape[-1]))", "F.pad(base, (0, 4 - base.shape[-1]), value=-11.5)"),
            ],
            "points are sizes": [("(0, 4 - base.shape[-1])", "(4 - base.shape[-1], 0)")],
            "no eps": [("inverse_sigmoid(start, eps)", "torch.logit(start)")],
            "always this eps": [("inverse_sigmoid(start, eps)", "inverse_sigmoid(start)")],
        },
    ),
    ("30", "check_grid_logits"): Answers(
        right="""
def grid_logits(rows, columns):
    found = []
    for row in range(rows):
        for column in range(columns):
            found.append([(2 * column + 1) / (2 * columns), (2 * row + 1) / (2 * rows)])
    return torch.logit(torch.tensor(found))
""",
        wrong={
            "y first": [("torch.stack((x, y), -1)", "torch.stack((y, x), -1)")],
            "column by column": [(".flatten(0, 1)", ".transpose(0, 1).flatten(0, 1)")],
            "shares": [("return inverse_sigmoid", "return ")],
            "corners of the cells": [("+ 0.5", "+ 1")],
            "from border to border": [
                ("(torch.arange(rows) + 0.5) / rows", "torch.linspace(0, 1, rows)"),
                ("(torch.arange(columns) + 0.5) / columns", "torch.linspace(0, 1, columns)"),
            ],
            "rows and columns exchanged": [("(rows) + 0.5) / rows", "(rows) + 0.5) / columns")],
        },
    ),
    ("31", "check_share_of_softmax"): Answers(
        right="""
def share_of_softmax(score, no_object_weight):
    odds = no_object_weight * score / (1 - score)
    return odds / (1 + odds)
""",
        wrong={
            "a score is a share": "def share_of_softmax(score, no_object_weight):\n    return score\n",
            "the score from the share": """
def share_of_softmax(score, no_object_weight):
    return score / (score + no_object_weight * (1 - score))
""",
            "the weight alone": "def share_of_softmax(score, no_object_weight):\n    return no_object_weight * score\n",
            "always a tenth": [("no_object_weight * score", "0.1 * score")],
            "the share without the object": """
def share_of_softmax(score, no_object_weight):
    return (1 - score) / (1 - score + no_object_weight * score)
""",
        },
    ),
    ("31", "check_real_classes"): Answers(
        right="""
def real_classes(logits, names):
    real = torch.tensor([name != "N/A" for name in names])
    return logits[..., real], [name for name in names if name != "N/A"]
""",
        wrong={
            "the first eighty": "def real_classes(logits, names):\n    return logits[..., :80], list(names[:80])\n",
            "without column 0 only": "def real_classes(logits, names):\n    return logits[..., 1:], list(names[1:])\n",
            "names only": [("logits[..., kept]", "logits[..., : len(kept)]")],
            "off by one": [("logits[..., kept]", "logits[..., [column - 1 for column in kept]]")],
            "by the alphabet": [("[names[column] for column in kept]", "sorted(names[column] for column in kept)")],
            "COCO's whatever the names": [("enumerate(names)", "enumerate(COCO_NAMES)")],
        },
    ),
    ("32", "check_two_part_scores"): Answers(
        right="""
def two_part_scores(content_q, place_q, content_k, place_k, heads):
    pairs = ((content_q, content_k), (place_q, place_k))
    scores = [torch.einsum("bqhk,bshk->bhqs", q.unflatten(-1, (heads, -1)), k.unflatten(-1, (heads, -1)))
              for q, k in pairs]
    return sum(scores) / math.sqrt(2 * content_q.shape[-1] / heads)
""",
        wrong={
            "join, then cut": [
                ("(part.unflatten(-1, (heads, -1)) for part in (content, place))", "(content, place)"),
                ("-1).transpose(1, 2)", "-1).unflatten(-1, (heads, -1)).transpose(1, 2)"),
            ],
            "the old divisor": [("q.shape[-1] ** 0.5", "(q.shape[-1] / 2) ** 0.5")],
            "added": [("torch.cat(list(parts), -1)", "sum(parts)")],
            "added, the new divisor": [
                ("torch.cat(list(parts), -1)", "sum(parts)"), ("q.shape[-1] ** 0.5", "(2 * q.shape[-1]) ** 0.5"),
            ],
            "weights, not scores": [("return q @", "return (q @"), ("** 0.5", "** 0.5).softmax(-1)")],
            "divided by the width": [("q.shape[-1] ** 0.5", "q.shape[-1]")],
        },
    ),
    ("32", "check_scale_to"): Answers(
        right="""
def scale_to(point, goal, width):
    scale = []
    for j in range(0, width, 2):
        a, b = (2 * math.pi * float(share) / 20 ** (j / width) for share in (point, goal))
        scale += [math.sin(b) / math.sin(a), math.cos(b) / math.cos(a)]
    return torch.tensor(scale)
""",
        wrong={
            "the other way round": [("there / here", "here / there")],
            "the difference": [("there / here", "there - here")],
            "the goal's sine alone": [("there / here", "there")],
            "one factor a pair": [("there / here", "(there / here).view(-1, 2).mean(1).repeat_interleave(2)")],
            "the quotient of the shares": [("there / here", "(goal / point).expand(width)")],
            "another temperature": [("width, 20)", "width)")],
        },
    ),
    ("33", "check_fused_row_column"): Answers(
        right="""
def fused_row_column(q, q_down, k, k_down, v):
    across = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)[..., None, :]
    down = (q_down @ k_down.transpose(-1, -2) / q.shape[-1] ** 0.5)[..., :, None]
    return (across + down).flatten(-2).softmax(-1) @ v.flatten(2, 3)
""",
        wrong={
            "the root of the wider width": [("2**0.5 * ", "")],
            "twice as sharp": [("2**0.5", "2")],
            "rows and columns exchanged": [("torch.cat((q, q_down), -1)", "torch.cat((q_down, q), -1)")],
            "columns only": """
def fused_row_column(q, q_down, k, k_down, v):
    return attention_weights(q, k) @ v.mean(2)
""",
            "a sum of weights": """
def fused_row_column(q, q_down, k, k_down, v):
    across, down = attention_weights(q, k)[..., None, :], attention_weights(q_down, k_down)[..., :, None]
    return ((across + down) / 2).flatten(-2) @ v.flatten(2, 3)
""",
        },
    ),
    ("33", "check_picture_means"): Answers(
        right="""
def picture_means(keys, pad):
    found = []
    for axis in (1, 2):
        total = keys.masked_fill(pad[..., None], 0).sum(axis)
        count = (~pad).sum(axis)[..., None]
        found.append(torch.where(count > 0, total / count, torch.zeros_like(total)))
    return tuple(found)
""",
        wrong={
            "padded cells count": """
def picture_means(keys, pad):
    return keys.mean(1), keys.mean(2)
""",
            "divided by all": [("picture.sum(axis).clamp(min=1)", "picture.shape[axis]")],
            "no guard": [(".clamp(min=1)", "")],
            "the padding instead": [("(~pad)", "pad")],
            "rows first": [("(1, 2)", "(2, 1)")],
        },
    ),
    ("34", "check_box_scores"): Answers(
        right="""
def box_scores(ref, wanted, columns, rows):
    found = []
    for (x, y, w, h), (wide, tall) in zip(ref, wanted):
        along_x = columns @ sine_embedding(2 * math.pi * x, 128, 20) * wide / w
        along_y = rows @ sine_embedding(2 * math.pi * y, 128, 20) * tall / h
        found.append((along_y[:, None] + along_x) / 16)
    return torch.stack(found)
""",
        wrong={
            "width and height change places": [(" = (wanted / ref[:, 2:])", " = (wanted / ref[:, 2:]).flip(1)")],
            "the ratio is upside down": [("wanted / ref[:, 2:]", "ref[:, 2:] / wanted")],
            "only the box's sides count": [("wanted / ref[:, 2:]", "1 / ref[:, 2:]")],
            "the scale of one axis": [("256**0.5", "128**0.5")],
            "columns first": [("(along_y[:, :, None] + along_x[:, None])", "(along_x[:, :, None] + along_y[:, None])")],
        },
    ),
    ("34", "check_box_path"): Answers(
        right="""
def box_path(start, steps):
    path = [start]
    for step in steps:
        logit = (path[-1].clamp(min=1e-3) / (1 - path[-1]).clamp(min=1e-3)).log()
        path.append(1 / (1 + (-logit - step).exp()))
    return torch.stack(path)
""",
        wrong={
            "steps are added to shares": [("(inverse_sigmoid(path[-1], 1e-3) + step).sigmoid()", "path[-1] + step")],
            "every layer counts from the start": [("inverse_sigmoid(path[-1], 1e-3)", "inverse_sigmoid(start, 1e-3)")],
            "another floor": [("path[-1], 1e-3", "path[-1], 1e-5")],
            "a floor at one end only": [
                ("inverse_sigmoid(path[-1], 1e-3)", "(path[-1].clamp(min=1e-3) / (1 - path[-1])).log()")
            ],
            "the start is left out": [("torch.stack(path)", "torch.stack(path[1:])")],
        },
    ),
    ("35", "check_deviation"): Answers(
        right="""
def deviation(scale, smooth):
    return (smooth / (2 * scale**2)) ** 0.5
""",
        wrong={
            "the sign of the scale": [("abs(scale)", "scale")],
            "no half": [("smooth / 2", "smooth")],
            "always 8": [("math.sqrt(smooth / 2)", "2")],
            "no root": [("math.sqrt(smooth / 2)", "smooth / 4")],
            "a larger scale, a wider bell": [("/ abs(scale)", "* abs(scale)")],
            "the variance": [("math.sqrt(smooth / 2) / abs(scale)", "smooth / 2 / scale**2")],
        },
    ),
    ("35", "check_misplaced"): Answers(
        right="""
def misplaced(share, picture, frame, stride):
    sizes = torch.tensor([frame[::-1], picture[::-1]]) / stride
    return share * sizes[0] - share * sizes[1]
""",
        wrong={
            "x and y exchanged": [("[width, height]", "[height, width]")],
            "in pixels": [(" / stride", "")],
            "always 32": [("/ stride", "/ 32")],
            "whole cells": [
                ("height, width = frame[0] - picture[0], frame[1] - picture[1]",
                 "height, width = ((f // stride - p // stride) * stride for f, p in zip(frame, picture))"),
            ],
            "the other way": [("return share", "return -share")],
            "the whole padding": [("share * torch", "torch.ones_like(share) * torch")],
        },
    ),
    ("35", "check_tilted_bias"): Answers(
        right="""
def tilted_bias(centre, scales, tilt, shape):
    found = torch.zeros(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            u, v = scales[0] * (column - centre[0]), scales[1] * (row - centre[1])
            found[row, column] = -(u**2 - 2 * tilt * u * v + v**2) / 8
    return found
""",
        wrong={
            "tilted the other way": [("- 2 * tilt", "+ 2 * tilt")],
            "no 2": [("2 * tilt", "tilt")],
            "the star of type4": [("2 * tilt * u * v", "2 * tilt * u.square() * v.square()")],
            "no tilt": [(" - 2 * tilt * u * v", "")],
            "distances without scales in the product": [
                ("tilt * u * v", "tilt * u * v / (scales[0] * scales[1])"),
            ],
            "scales exchanged": [("u = scales[0]", "u = scales[1]"), ("v = scales[1]", "v = scales[0]")],
            "not divided": [(") / 8", ")")],
        },
    ),
    ("36", "check_touched"): Answers(
        right="""
def touched(box_xyxy, stride):
    x0, y0, x1, y1 = box_xyxy
    columns = len(range(int(x0 // stride), math.ceil(x1 / stride)))
    return columns * len(range(int(y0 // stride), math.ceil(y1 / stride)))
""",
        wrong={
            "its area": [("return columns * rows", "return math.ceil((x1 - x0) * (y1 - y0))")],
            "its sides, rounded up": [
                ("math.ceil(x1) - math.floor(x0)", "math.ceil(x1 - x0)"),
                ("math.ceil(y1) - math.floor(y0)", "math.ceil(y1 - y0)"),
            ],
            "lines belong to the cell behind them": [
                ("math.ceil(x1)", "math.floor(x1) + 1"), ("math.ceil(y1)", "math.floor(y1) + 1"),
            ],
            "columns alone": [("columns * rows", "columns")],
            "corners to the nearest line": [
                ("math.ceil(x1) - math.floor(x0)", "max(round(x1) - round(x0), 1)"),
                ("math.ceil(y1) - math.floor(y0)", "max(round(y1) - round(y0), 1)"),
            ],
            "taken for centre and size": [("columns = math.ceil(x1)", "columns = math.ceil(x0 + x1)")],
        },
    ),
    ("36", "check_address"): Answers(
        right="""
def address(number, shapes):
    starts = [sum(rows * columns for rows, columns in shapes[:level]) for level in range(len(shapes))]
    level = max(place for place, start in enumerate(starts) if start <= number)
    inside = number - starts[level]
    return level, inside // shapes[level][1], inside % shapes[level][1]
""",
        wrong={
            "column by column": [("*divmod(number, columns)", "*divmod(number, rows)[::-1]")],
            "shapes are columns and rows": [("(rows, columns) in", "(columns, rows) in")],
            "coarsest first": [("enumerate(shapes)", "list(enumerate(shapes))[::-1]")],
            "levels from 1": [("return level,", "return level + 1,")],
            "levels before are forgotten": [
                ("*divmod(number, columns)", "*divmod(number + sum(a * b for a, b in shapes[:level]), columns)"),
            ],
            "one too late": [("if number < rows * columns", "if number <= rows * columns")],
        },
    ),
    ("36", "check_overshoot"): Answers(
        right="""
def overshoot(height, stride):
    return -height % stride
""",
        wrong={
            "rounded down": [("math.ceil(height / stride)", "height // stride")],
            "to the nearest": [("math.ceil(height / stride)", "round(height / stride)")],
            "one row more, always": [("math.ceil(height / stride)", "height // stride + 1")],
            "in cells": [("rows * stride - height", "rows - height // stride")],
            "the other way": [("rows * stride - height", "height - rows * stride")],
            "what is left over": [("return rows * stride - height", "return height % stride")],
        },
    ),
    ("37", "check_reach"): Answers(
        right="""
def reach(columns=64, levels=4, points=4):
    found, wide = [], 2 * points / columns
    for _ in range(levels):
        found.append(wide)
        wide *= 2
    return found
""",
        wrong={
            "one side only": [("2 * points", "points")],
            "the same share on each level": [("* 2**level ", "")],
            "coarser levels reach less": [("* 2**level /", "/ 2**level /")],
            "four points, whatever is asked": [("2 * points", "8")],
            "levels count from one": [("2**level", "2 ** (level + 1)")],
        },
    ),
    ("37", "check_gather_points"): Answers(
        right="""
def gather_points(cells, shape, points):
    found = []
    for x, y in points.tolist():
        total = torch.zeros(cells.shape[1])
        for row in range(shape[0]):
            for column in range(shape[1]):
                near_x = max(0.0, 1 - abs(x * shape[1] - 0.5 - column))
                near_y = max(0.0, 1 - abs(y * shape[0] - 0.5 - row))
                total = total + near_x * near_y * cells[row * shape[1] + column]
        found.append(total)
    return torch.stack(found)
""",
        wrong={
            "centres at whole numbers": [(" - 0.5\n", "\n")],
            "the border is repeated outside": [
                ("torch.where(inside, y * columns + x, 0)", "y.clamp(0, rows - 1) * columns + x.clamp(0, columns - 1)"),
                ("(near * inside)", "near"),
            ],
            "the nearest cell alone": [("near = (1 -", "near = ((1 -"), (".prod(1)", ".prod(1) > 0.5).float()")],
            "rows and columns exchanged": [("torch.tensor([columns, rows])", "torch.tensor([rows, columns])")],
            "tokens column by column": [("y * columns + x, 0", "x * rows + y, 0")],
        },
    ),
    ("37", "check_misplaced"): Answers(
        right="""
def misplaced(sides):
    return torch.stack([(column - sides[0, 0]) / (column * sides[0, 0]) for column in sides[:, 0]])
""",
        wrong={
            "too far right": [("1 / columns[0] - 1 / columns", "1 / columns - 1 / columns[0]")],
            "rows count": [("sides[:, 0]", "sides[:, 1]")],
            "in cells": [("1 / columns[0] - 1 / columns", "columns / columns[0] - 1")],
            "the last level's cells": [("columns[0]", "columns[-1]")],
        },
    ),
    ("38", "check_may_propose"): Answers(
        right="""
def may_propose(cells_in_a_row, side):
    count = 0
    for row in range(cells_in_a_row):
        for column in range(cells_in_a_row):
            numbers = ((row + 0.5) / cells_in_a_row, (column + 0.5) / cells_in_a_row, side)
            count += all(0.01 < number < 0.99 for number in numbers)
    return count
""",
        wrong={
            "the square must lie inside": [
                ("(centres > 0.01) & (centres < 0.99)", "(centres > side / 2) & (centres < 1 - side / 2)")
            ],
            "the side does not count": [("good**2 if 0.01 < side < 0.99 else 0", "good**2")],
            "one row": [("good**2", "good")],
            "centres do not count": [("good**2", "cells_in_a_row**2")],
            "corners instead of centres": [("(cells_in_a_row) + 0.5", "(cells_in_a_row) + 0.0")],
        },
    ),
    ("38", "check_best_cells"): Answers(
        right="""
def best_cells(logits, proper, count):
    found = []
    for some, good in zip(logits, proper):
        order = sorted(range(len(some)), key=lambda cell: (not good[cell], -float(some[cell].max())))
        found.append(order[:count])
    return torch.tensor(found)
""",
        wrong={
            "by the first class": [("logits.amax(-1)", "logits[..., 0]")],
            "by the sum of all classes": [("logits.amax(-1)", "logits.sum(-1)")],
            "whoever may propose": [(".masked_fill(~proper, -math.inf)", "")],
            "only those that may not": [("~proper", "proper")],
            "worst first": [("indices", "indices.flip(1)")],
            "as if it were one image": [("return score", "return score.amax(0, keepdim=True).expand_as(score)")],
        },
    ),
    ("39", "check_count_slots"): Answers(
        right="""
def count_slots(counts, groups):
    size = max(counts) or 1
    return size * groups, sum(count * groups for count in counts)
""",
        wrong={
            "objects of all images": [("max([1, *counts])", "sum(counts)")],
            "no slot without objects": [("max([1, *counts])", "max(counts)")],
            "one group": [("groups * max([1, *counts])", "max([1, *counts])")],
            "all slots filled": [("groups * sum(counts)", "groups * max(counts) * len(counts)")],
            "filled once": [(", groups * sum(counts)", ", sum(counts)")],
        },
    ),
    ("39", "check_contrastive_boxes"): Answers(
        right="""
def contrastive_boxes(boxes, sign, u, copy, scale):
    far = scale * sign * torch.where(copy[:, None] == 1, 1 + u, u)
    w, h = boxes[:, 2:].unbind(1)
    left, top, right, bottom = cxcywh_to_xyxy(boxes).unbind(1)
    moved = (left + far[:, 0] * w / 2, top + far[:, 1] * h / 2, right + far[:, 2] * w / 2, bottom + far[:, 3] * h / 2)
    return xyxy_to_cxcywh(torch.stack(moved, 1).clamp(0, 1))
""",
        wrong={
            "the whole side": [("boxes[:, 2:] / 2", "boxes[:, 2:]")],
            "both copies near": [("(u + copy[:, None])", "u")],
            "the copies exchanged": [("copy[:, None]", "1 - copy[:, None]")],
            "no clamp": [(".clamp(0, 1)", "")],
            "centre and size moved": [
                ("cxcywh_to_xyxy(boxes) + ", "boxes + "),
                ("xyxy_to_cxcywh(corners.clamp(0, 1))", "corners.clamp(0, 1)"),
            ],
            "the sides exchanged": [("boxes[:, 2:] / 2", "boxes[:, [3, 2]] / 2")],
            "no sign": [("sign * (u", "(u")],
            "corners returned": [("xyxy_to_cxcywh(corners.clamp(0, 1))", "corners.clamp(0, 1)")],
        },
    ),
    ("39", "check_which_leak"): Answers(
        right="""
def which_leak(mask, answering, size):
    found = set()
    for row in range(len(mask)):
        for column in range(len(mask)):
            sees, noised = bool(mask[row, column] == 0), column >= answering
            same = row >= answering and (row - answering) // size == (column - answering) // size
            if noised and row < answering and sees:
                found.add("answers")
            elif noised and row >= answering and not same and sees:
                found.add("groups")
            elif row >= answering and (same or not noised) and not sees:
                found.add("blind")
    return next((name for name in ("answers", "groups", "blind") if name in found), "")
""",
        wrong={
            "never anything": """
def which_leak(mask, answering, size):
    return ""
""",
            "rows and columns exchanged": [("= group[:, None], group,", "= group, group[:, None],")],
            "hidden read as seen": [("mask == 0", "mask != 0")],
            "only those that answer": [('return "groups"', 'return ""')],
            "own group forgotten": [("((column < 0) | (row == column))", "(column < 0)")],
            "those that answer forgotten": [("((column < 0) | (row == column))", "(row == column)")],
            "one slot a group": [("place.div(size", "place.div(1")],
            "in another order": [('return "answers"', 'return "groups"')],
        },
    ),
    ("39", "check_instability"): Answers(
        right="""
def instability(before, after, queries):
    old, new = (dict(zip(query.tolist(), goal.tolist())) for query, goal in (before, after))
    return sum(old.get(query, -1) != new.get(query, -1) for query in range(queries))
""",
        wrong={
            "objects counted": """
def instability(before, after, queries):
    old, new = (dict(zip(goal.tolist(), query.tolist())) for query, goal in (before, after))
    return sum(old.get(goal) != new.get(goal) for goal in {*old, *new})
""",
            "only those matched both times": """
def instability(before, after, queries):
    old, new = (dict(zip(query.tolist(), goal.tolist())) for query, goal in (before, after))
    return sum(old[query] != new[query] for query in old.keys() & new.keys())
""",
            "sets of queries": """
def instability(before, after, queries):
    return len(set(before[0].tolist()) ^ set(after[0].tolist()))
""",
            "a share": [("int((rows[0] != rows[1]).sum())", "round(float((rows[0] != rows[1]).float().mean()))")],
            "none is object 0": [("torch.full((queries,), -1)", "torch.full((queries,), 0)")],
            "how far": [("(rows[0] != rows[1])", "(rows[0] - rows[1]).abs()")],
        },
    ),
    ("42", "check_noised_queries"): Answers(
        right="""
def noised_queries(counts, number=100):
    groups = number // max(counts)
    return 2 * max(counts) * (groups if groups else 1)
""",
        wrong={
            "one copy": [(" * 2 * most", " * most")],
            "no group": [("max(number // most, 1)", "(number // most)")],
            "the mean decides": [("most = max(counts)", "most = sum(counts) // len(counts)")],
            "both kinds share the number": [("number // most", "number // (2 * most)")],
            "always twice the number": [("max(number // most, 1) * 2 * most", "2 * number")],
        },
    ),
    ("42", "check_must_refuse"): Answers(
        right="""
def must_refuse(true, noised, scale):
    found = []
    for a, b in zip(cxcywh_to_xyxy(true), cxcywh_to_xyxy(noised)):
        half = ((a[2:] - a[:2]) / 2).repeat(2)
        found.append(bool(((b - a).abs() > scale * half * 0.9999).all()))
    return torch.tensor(found)
""",
        wrong={
            "whole sides": [("true[:, 2:].repeat(1, 2) / 2", "true[:, 2:].repeat(1, 2)")],
            "the scale is left out": [(">= scale", ">= 1")],
            "sides exchanged": [("true[:, 2:].repeat", "true[:, 2:].flip(1).repeat")],
            "twice the scale": [(">= scale", ">= 2 * scale")],
            "the centre's move": [("cxcywh_to_xyxy(noised) - cxcywh_to_xyxy(true)", "noised - true")],
        },
    ),
    ("42", "check_chosen_wrongly"): Answers(
        right="""
def chosen_wrongly(logits, count):
    return sorted(range(len(logits)), key=lambda cell: -float(logits[cell, 0]))[:count]
""",
        wrong={
            "the likeliest class": [("logits[:, 0]", "logits.amax(1)")],
            "the last class": [("logits[:, 0]", "logits[:, -1]")],
            "worst first": [("topk(count)", "topk(count, largest=False)")],
            "as they stand": [("logits[:, 0].topk(count).indices.tolist()", "list(range(count))")],
        },
    ),
}


# --- tests ------------------------------------------------------------------------------------------------------------
def trace(value: object, depth: int = 6) -> object:
    """What a value holds, to be compared later: the numbers of tensors and arrays, and what lies in containers."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().tobytes(), value.requires_grad
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, nn.Module):
        return trace(dict(value.state_dict()), depth), value.training
    if isinstance(value, dict) and depth:
        return [(repr(key), trace(part, depth - 1)) for key, part in value.items()]
    if isinstance(value, list | tuple) and depth:
        return [trace(part, depth - 1) for part in value]
    if type(value).__module__.startswith(("detr_nb.", "chapter_")) and hasattr(value, "__dict__") and depth:
        return trace(vars(value), depth - 1)
    return type(value).__name__, value if isinstance(value, int | float | str | bytes | Path | None) else id(value)


def held(one: Exercise) -> dict[str, object]:
    """All names of a chapter that are no modules, classes or functions, and what they hold."""
    kept = {name: value for name, value in one.base.items() if not name.startswith("__")}
    return {name: trace(value) for name, value in kept.items() if not isinstance(value, ModuleType | type)}


def files() -> dict[Path, bytes]:
    """What lies in the folder of the chapters, without the links beside it."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def wrong_answers() -> Iterator:
    """Every wrong answer, with its exercise."""
    for key, answers in ANSWERS.items():
        for name, answer in answers.wrong.items():
            yield pytest.param(key, answer, id=f"{key[0]} {key[1].partition('_')[2]}: {name}")


CRASHES = {  # wrong answers that end the check with another error than that of an assertion, as the reader will see it
    "01 causal_bias: always six": "TypeCheckError",
    "02 shift: one matrix for all": "RuntimeError",
    "07 local: always 6 x 8": "TypeCheckError",
    "11 bootstrap: one image too few": "ValueError",
    "18 describe: no code": "TypeCheckError",
    "19 threshold: an error if there is none": "IndexError",
    "20 merge_classes: the rows of the new head": "IndexError",
    "22 mirrored: boxes and labels alone": "KeyError",
    "84 balanced_order: classes from 0 on": "ValueError",
    "85 yolo_text: a word where nothing is": "DataError",
    "86 stop_early: no row yet": "ValueError",
    "87 finite_mean: an error if there is none": "ZeroDivisionError",
    "88 fetched_names: it is opened": "FileNotFoundError",
    "88 fetched_names: opened, and noted": "FileNotFoundError",
    "89 as_flags: Python's texts": "ConfigError",
    "89 as_flags: kinds left out": "ConfigError",
    "89 as_flags: the outer names": "ConfigError",
    "89 as_flags: one word for both": "ConfigError",
    "97 whole_rows: the cut line is read": "JSONDecodeError",
    "31 real_classes: COCO's whatever the names": "IndexError",
    "33 picture_means: rows first": "TypeCheckError",
    "34 box_scores: columns first": "TypeCheckError",
}
each = pytest.mark.parametrize("key", EXERCISES, ids=" ".join)


def test_every_exercise_with_a_check_has_answers():
    assert list(ANSWERS) == list(EXERCISES)
    assert [key for key, answers in ANSWERS.items() if len(answers.wrong) < 3] == []
    assert CRASHES.keys() <= {row.id for row in wrong_answers()}


@each
def test_an_exercise_that_is_not_written_is_open(key, capsys):
    said = EXERCISES[key].try_out(None, capsys, times=2)
    assert all(words.startswith("open: ") for words in said), said


@each
def test_the_solution_is_right_twice_and_nothing_is_changed(key, capsys):
    one = EXERCISES[key]
    names, lying = held(one), files()
    said = one.try_out(one.right(), capsys, times=2)
    assert [words.splitlines()[-1] for words in said] == ["right", "right"], said
    assert held(one) == names
    assert files() == lying


@each
def test_a_right_answer_that_is_written_otherwise_is_right(key, capsys):
    (said,) = EXERCISES[key].try_out(EXERCISES[key].answer(ANSWERS[key].right), capsys)
    assert said.splitlines()[-1] == "right", said


@pytest.mark.parametrize(("key", "answer"), wrong_answers())
def test_a_wrong_answer_is_refused_with_a_hint(key, answer, capsys, request):
    (said,) = EXERCISES[key].try_out(EXERCISES[key].answer(answer), capsys)
    hint = re.search(r"^not yet: (\w+) (.*?)^    at: \S", said, re.M | re.S)
    assert hint and hint[2].strip(), said
    assert hint[1] == CRASHES.get(request.node.callspec.id, "AssertionError"), said


@each
def test_wrong_answers_do_not_keep_a_right_one_from_being_right(key, capsys):
    (said,) = EXERCISES[key].try_out(EXERCISES[key].right(), capsys)
    assert said.splitlines()[-1] == "right", said


def test_a_check_in_the_solutions_is_that_of_the_chapter():
    for one in EXERCISES.values():
        (check,) = (one.all[i].text for i in one.chosen if one.check in one.all[i].binds)
        copies = [part.text for part in statements(one.solution) if one.check in part.binds]
        assert set(copies) <= {check}, f"{one.chapter}: {one.check}"
