"""Numbers in prose stand on something: an output or code of their page, a record, a source, or a reason."""

import json
import random
from ast import Call, parse, unparse, walk
from dataclasses import replace

import pytest
from claims import ROOT, Claim, Page, claims_of, numbers_in, numbers_of_record, pages

ALLOWED = json.loads((ROOT / "tests" / "data" / "claims.json").read_text("utf8"))
PAGES = pages()


def open_words(page: Page) -> list[str]:
    """The claims of a page that nothing on it holds."""
    return sorted({claim.words for claim in page.open_claims()})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_number_in_prose_has_a_ground(path):
    page = Page(path)
    found, allowed = open_words(page), ALLOWED.get(page.name, {})
    new = [words for words in found if words not in allowed]
    assert new == [], (
        f"{page.name} says {', '.join(new)}, and no code, output near it, record or source of the page does:"
        " correct it, assert it in a cell nearby, cite its source, or give a reason in tests/data/claims.json"
    )
    assert sorted(allowed) == found, f"tests/data/claims.json allows for {page.name} what is held, or said no more"


def test_the_list_of_exceptions_is_short_and_gives_reasons():
    reasons = [reason for page in ALLOWED.values() for reason in page.values()]
    assert len(reasons) < 40 and all(len(reason.split()) > 3 for reason in reasons)
    assert set(ALLOWED) <= {str(path.relative_to(ROOT)) for path in PAGES}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AP falls to 0.67, by 12 %.", ["0.67", "12 %"]),
        ("Twice, or 1.7 times as much; 46 per cent of it.", ["1.7 times", "46 per cent"]),
        ("It has 41.5 million of them and 2,014.5 others.", ["41.5 million", "2,014.5"]),
        ("In 2020, with 24 images, torch 2.6 or Python 3.11 and 3.13, section 4.2 and table 3.", []),
        ("See [chapter 3.1](03_boxes.ipynb#version-2.5), `x = 0.25`, $a = 0.5$, https://a.org/1.5 .", []),
        ("```python\nx = 0.5\n```\nand 0.7", ["0.7"]),
        ("| a | b |\n|---|---|\n| 0.25 | 30% |", ["0.25", "30%"]),
        ("It is 0.5 times the width, 3 times 4, and three times as fast.", ["0.5"]),
        ("Version 1.2.3, and 640 x 480.", []),
    ],
)
def test_what_is_a_claim(text, words):
    assert [claim.words for claim in claims_of(text, "page")] == words


@pytest.mark.parametrize(
    ("text", "numbers", "held"),
    [
        ("0.67", "0.6749", True),
        ("0.67", "0.676", False),
        ("0.670", "0.6749", False),
        ("12 %", "0.1249", True),
        ("12 %", "12.4 per cent", True),
        ("12 %", "0.13", False),
        ("41.5 million", "41,524,768", True),
        ("41.6 million", "41,524,768", False),
        ("1.7 times as much", "1.68", True),
        ("0.0001 or so", "1e-4", True),
    ],
)
def test_what_holds_a_claim(text, numbers, held):
    (claim,) = claims_of(text, "page")
    assert claim.held(sorted(numbers_in(numbers))) is held


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("It loses 1.3 AP (table 3).", True),
        ("Zhu et al. report 46.2.", True),
        ("The paper has:\n\n| 42.0 |\n\nAnd 43.3 here.", False),
        ("Table 1 of the paper:\n\n| model | AP |\n|---|---|\n| x | 42.0 |", True),
        ("The paper loses 1.3 AP.", False),
    ],
)
def test_who_names_a_place_in_a_source_cites_it(text, cited):
    claims = list(claims_of(text, "page"))
    assert claims and all(claim.cited is cited for claim in claims)


def test_long_lists_of_a_record_hold_nothing():
    record = {"metrics": {"AP": 0.75, "AP_large": float("nan")}, "curve": [{"AP": 0.1}], "rows": [{"ratio": -2}]}
    assert sorted(numbers_of_record(record)) == [0.75, 2]


def changed(claim: Claim, by: int) -> str:
    """A claim with other last digits, as it would be written."""
    return f"{claim.value + by * 10**-claim.digits:.{claim.digits}f}"


def test_a_number_that_goes_wrong_is_noticed():
    """Numbers with two digits and more, changed by a little in a copy of their paragraph: most have no ground then."""
    dice, noticed = random.Random(0), []
    for page in map(Page, PAGES):
        for place, cell in enumerate(page.cells):
            if cell["cell_type"] == "markdown":
                numbers = page.numbers_near(place)
                for claim in claims_of("".join(cell["source"]), page.name):
                    if claim.digits >= 2 and not claim.cited:
                        wrong = float(changed(claim, dice.choice((-7, -3, 3, 7))))
                        noticed.append(not replace(claim, value=abs(wrong)).held(numbers))
    assert len(noticed) > 50 and sum(noticed) > 0.5 * len(noticed), f"{sum(noticed)} of {len(noticed)}"


@pytest.mark.parametrize("path", [path for path in PAGES if path.suffix == ".ipynb"], ids=lambda path: path.stem)
def test_what_trains_while_the_book_is_built_counts_steps(path):
    """By the clock a slow machine would train less, and tell another story."""
    for text in Page(path).sources("code"):
        if "TrainConfig" in text and "minutes" in text:
            calls = [node for node in walk(parse(text)) if isinstance(node, Call)]
            assert [unparse(call) for call in calls if "minutes" in {word.arg for word in call.keywords}] == []
