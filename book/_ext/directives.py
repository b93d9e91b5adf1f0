"""The directives of nbdev at the head of a code cell (`#| export`), and the tags of Jupyter Book that they become."""

import re

import nbformat

TAGS = {
    ("hide", ""): ["remove-cell"],
    ("export", ""): ["export"],
    ("exporti", ""): ["export"],
    ("exports", ""): ["export"],
    ("echo", "false"): ["remove-input"],
    ("echo", "true"): [],
    ("output", "false"): ["remove-output"],
    ("include", "false"): ["remove-cell"],
    ("eval", "false"): ["skip-execution"],
    ("slow", ""): ["skip-execution"],
    ("gpu", ""): ["skip-execution"],
    ("code-fold", "true"): ["hide-input"],
    ("code-fold", "false"): [],
    ("alone", ""): [],  # measures time: tools/execute.py runs nothing beside it
}
TEXTS = ("label", "fig-cap", "fig-alt", "reads", "default_exp")
_DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.*?)\s*$")


def split_directives(source: str) -> tuple[list[tuple[str, str]], str]:
    """The directives at the head of a code cell as (name, value) pairs, and the rest of the cell."""
    lines, found = source.splitlines(), []
    while lines and (match := _DIRECTIVE.match(lines[0])):
        name, _, value = match[1].partition(":") if ":" in match[1] else match[1].partition(" ")
        found.append((name.strip(), value.strip().strip("\"'")))
        lines.pop(0)
    return found, "\n".join(lines).lstrip("\n") if found else source


def apply_directives(cell: nbformat.NotebookNode) -> list[str]:
    """Turn the directives of one code cell into tags and figure options; returns the files that it says it reads.

    Args:
        cell: A code cell, changed in place.

    Raises:
        ValueError: If a directive is not one of ours.
    """
    directives, cell.source = split_directives(cell.source)
    tags, figure, alt, reads = list(cell.metadata.get("tags", [])), {}, None, []
    for name, value in directives:
        if name == "label":
            figure["name"] = value
        elif name == "fig-cap":
            figure["caption"] = value
        elif name == "fig-alt":
            alt = value
        elif name == "reads":
            reads += value.split()
        elif name == "default_exp":
            tags.append("remove-cell")
        elif (name, value) in TAGS:
            tags += TAGS[name, value]
        else:
            known = ", ".join(sorted({n for n, _ in TAGS} | set(TEXTS)))
            raise ValueError(f"unknown directive '#| {name} {value}' (known: {known})")
    if "name" in figure and "caption" not in figure:
        raise ValueError(f"'#| label: {figure['name']}' needs a '#| fig-cap: ...' beside it")
    if "nbdev_export" in cell.source:  # building the book must never rewrite the library
        cell.source = ""
        tags.append("remove-cell")
    if not cell.source.strip():
        tags.append("remove-cell")
    options = ({"figure": figure} if figure else {}) | ({"image": {"alt": alt}} if alt else {})
    if options:
        cell.metadata["mystnb"] = options
    if tags:
        cell.metadata["tags"] = list(dict.fromkeys(tags))
    return reads
