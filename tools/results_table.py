"""Write the table of results into README.md from the records under results/."""
import json
import re
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "easy": "easy: three classes, 1 to 6 objects",
    "default": "default: six classes, 1 to 10 objects, clutter",
}
RECIPES = {"": "", "paper_": ", the paper's rates and weights"}
HEAD = """Vanilla DETR from scratch on two processor cores, in bfloat16 by autocast, COCO AP on 500 held-out scenes, \
mean over seeds:

| setting | budget | seeds | AP | AP50 | how it was made |
|---|---|---|---|---|---|
"""


def table_row(setting: str, minutes: int, recipe: str) -> str:
    """One line of the table, or nothing if no such run was recorded."""
    files = sorted((ROOT / "results").glob(f"shapes_{setting}_{minutes}min_{recipe}seed*.json"))
    rows = [json.loads(file.read_text()) for file in files]
    if not rows:
        return ""
    links = ", ".join(f"[seed {row['seed']}](results/{file.name})" for row, file in zip(rows, files, strict=True))
    command = re.sub(r"--seed \d", "--seed S", rows[0]["command"])
    figures = " | ".join(f"{mean(row['metrics'][name] for row in rows):.3f}" for name in ("AP", "AP50"))
    about = SETTINGS[setting] + RECIPES[recipe]
    return f"| {about} | {minutes} minutes | {len(rows)} | {figures} | `{command}`: {links} |\n"


def main() -> None:
    """Rewrite the block between the marks; the lines after the table stay."""
    table = HEAD + "".join(
        table_row(setting, minutes, recipe) for setting in SETTINGS for recipe in RECIPES for minutes in (5, 10)
    )
    readme = ROOT / "README.md"
    text = readme.read_text("utf8")
    mark, end = "<!-- RESULTS:BEGIN -->\n", "<!-- RESULTS:END -->"
    before, rest = text.split(mark)
    block, after = rest.split(end)
    words = block.rpartition("|\n")[2]
    readme.write_text(f"{before}{mark}{table}{words}{end}{after}", "utf8")


if __name__ == "__main__":
    main()
