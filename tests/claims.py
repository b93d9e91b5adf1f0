"""Numbers in the prose of the book: where they stand, and what on the same page holds them."""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "results"
# what is no prose: code, addresses, formulas, HTML, directives
NO_PROSE = re.compile(
    r"^(`{3,}|:{3,})\{?(?!list|note|tip|warning|admonition).*?^\1\s*$"  # fenced blocks
    r"|<!-- RESULTS:BEGIN.*?RESULTS:END -->"  # tests/test_results.py holds it to the records
    r"|<!--.*?-->|<[^>\n]+>|`[^`\n]+`"
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\2\}|\$\$.*?\$\$|\$[^$\n]+\$",
    re.M | re.S,
)
UNITS = {"thousand": 1e3, "million": 1e6, "billion": 1e9}
ADDRESS = re.compile(r"(?<=\])\([^)\n]*\)|https?://\S+")
NAMED = re.compile(  # a number that names a place or a version, and measures nothing
    r"(?:[Ss]ections?|[Tt]ables?|[Ff]igures?|[Aa]ppendix|[Ee]quations?|[Cc]hapters?|[Ee]xercises?|[Ee]xperiments?"
    r"|[Vv]ersions?|Python|Pillow|[Tt]orch(?:vision)?|PyTorch|IPython|CUDA|ONNX|transformers|Apache-?|CC BY)"
    r"\s+(?:[A-Z]\.)?\d[\d.]*(?:(?:,| and| to| or|/)\s*(?:[A-Z]\.)?\d[\d.]*)*"
)
DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
CLAIM = re.compile(
    rf"(?<![\w.,])(?P<number>{DIGITS})(?![\d.,]*\d)"
    r"(?:(?P<scale>\s(?:thousand|million|billion)\b)|(?P<percent>\s?%|\s+per ?cent\b)"
    r"|(?P<times>\s+times\b(?!\s+(?:the|its|\d))|-fold\b))?"
)
NUMBER = re.compile(r"(?<![\w.])\d+(?:_\d+)*(?:\.\d*)?(?:e[+-]?\d+)?|(?<![\w.])\.\d+(?:e[+-]?\d+)?")
# the book numbers none of its own tables, figures and sections: who names one by its number cites the paper
PLACE = r"\b(?:[Ss]ections?|[Tt]ables?|[Ff]igures?|[Aa]ppendix|[Ee]quations?)\s(?:[A-Z]\.)?\d"
SOURCE = re.compile(rf"{PLACE}|et al\.|arxiv\.org|doi\.org|github\.com/\S+/(?:issues|pull)")
# lists in a record that hold so many numbers that any number is among them
LONG = {"curve", "samples", "history", "versions", "machine", "date", "per_class", "config", "matches"}
# outputs hold a claim within so many cells; those of all cells hold what the opening, the recap or an exercise says
NEAR, OPENING = 6, 12
WIDE = re.compile(r"^## (?:Recap|What we learned|Exercises)|^\*\*How sure", re.M)


@dataclass(frozen=True)
class Claim:
    """A number that a page says: a decimal, a percentage, or a factor.

    Attributes:
        page: the file, from the folder of the project.
        words: the number as it is written, with its sign of percent or "times".
        value: what it says.
        digits: how many decimals it has.
        unit: what its words multiply it by: 0.01 for a percentage, 1000 for "thousand".
        paragraph: where it stands.
    """

    page: str
    words: str
    value: float
    digits: int
    unit: float
    paragraph: str

    @property
    def cited(self) -> bool:
        """Whether its paragraph names a source outside the page."""
        return bool(SOURCE.search(self.paragraph))

    def held(self, numbers: list[float]) -> bool:
        """Whether one of these sorted numbers rounds to it."""
        half = 0.5 * 10**-self.digits * (1 + 1e-6)
        return any(near(numbers, self.value * unit, half * unit) for unit in (1, self.unit))

    def __str__(self) -> str:
        return f"{self.page}: {self.words}"


def near(numbers: list[float], value: float, room: float) -> bool:
    """Whether a sorted list has a number so close to a value."""
    place = bisect_left(numbers, value - room)
    return place < len(numbers) and numbers[place] <= value + room


def claims_of(text: str, page: str) -> Iterator[Claim]:
    """The claims in a Markdown text; a table and its rows belong to the paragraph before it."""
    blocks = re.split(r"\n\s*\n(?!\s*\|)|\n(?=\s*[-*] )|\n(?=\s*\d+\. )", NO_PROSE.sub(" ", text))
    for block in blocks:
        for found in CLAIM.finditer(NAMED.sub(" ", ADDRESS.sub(" ", block))):
            number = found["number"]
            digits = len(number.partition(".")[2])
            if digits or found["percent"] or found["times"]:
                words, unit = " ".join(found[0].split()), UNITS.get((found["scale"] or "").strip(), 1)
                unit = 0.01 if found["percent"] else unit
                yield Claim(page, words, float(number.replace(",", "")), digits, unit, block)


def numbers_in(text: str) -> Iterator[float]:
    """All numbers of a text, without their signs."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return (float(number.replace("_", "")) for number in NUMBER.findall(text))


def numbers_of_record(value: object) -> Iterator[float]:
    """All numbers of a record, without its long lists."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in LONG:
                yield from numbers_of_record(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers_of_record(part)
    elif isinstance(value, int | float) and value == value:
        yield abs(float(value))


class Page:
    """A notebook or a Markdown file: what it claims, and the numbers that hold claims."""

    def __init__(self, path: Path):
        self.name = str(path.relative_to(ROOT))
        text = path.read_text("utf8")
        whole = {"cell_type": "markdown", "source": text}
        self.cells = json.loads(text)["cells"] if path.suffix == ".ipynb" else [whole]

    def sources(self, kind: str) -> list[str]:
        """The cells of a kind."""
        return ["".join(cell["source"]) for cell in self.cells if cell["cell_type"] == kind]

    def claims(self) -> list[Claim]:
        """All claims in prose."""
        return [claim for text in self.sources("markdown") for claim in claims_of(text, self.name)]

    def records(self) -> list[Path]:
        """The records that the page names or reads."""
        text = "\n".join(self.sources("code") + self.sources("markdown"))
        every = "results/*.json" in text
        return [path for path in sorted(RECORDS.glob("*.json")) if every or path.name in text]

    @cached_property
    def of_records(self) -> list[float]:
        """All numbers in the records of the page."""
        rows = (json.loads(path.read_text("utf8")) for path in self.records())
        return [number for row in rows for number in numbers_of_record(row)]

    @cached_property
    def of_code(self) -> list[float]:
        """All numbers that are written in the code of the page: what its readers see as given."""
        return [number for text in self.sources("code") for number in numbers_in(text)]

    @cached_property
    def of_outputs(self) -> list[list[float]]:
        """The numbers of the stored outputs of each cell."""
        return [[number for text in outputs_of(cell) for number in numbers_in(text)] for cell in self.cells]

    def numbers_near(self, place: int) -> list[float]:
        """What may hold a claim of a cell: code, records, and outputs near it (any for the opening and the recap)."""
        text = "".join(self.cells[place]["source"])
        start, end = (0, None) if place < OPENING or WIDE.search(text) else (max(0, place - NEAR), place + NEAR + 1)
        near_it = [number for cell in self.of_outputs[start:end] for number in cell]
        return sorted(near_it + self.of_code + self.of_records)

    def open_claims(self) -> list[Claim]:
        """Claims that nothing near them holds."""
        found = []
        for place, cell in enumerate(self.cells):
            if cell["cell_type"] == "markdown":
                claims = [claim for claim in claims_of("".join(cell["source"]), self.name) if not claim.cited]
                numbers = self.numbers_near(place) if claims else []
                found += [claim for claim in claims if not claim.held(numbers)]
        return found


def outputs_of(cell: dict) -> Iterator[str]:
    """The stored outputs of a cell as text."""
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", []))
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield "".join(data)


def pages() -> list[Path]:
    """All pages of the book and the front page of the project."""
    notebooks = [path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    return [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md")), *sorted(notebooks)]
