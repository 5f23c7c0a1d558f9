"""Recipes of published models: NAME.yaml holds the settings of `kdfast.train`, and what was found.

Under `settings` stand flags of kdfast.train. What stands under `published` is printed, and decides
nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdfast.common.errors import unknown_name

FOLDER = Path(__file__).parent
LEGEND = (
    "parameters: of the student's layers, and of its embeddings.",
    "*: of no reader of this recipe, as none is known to be published; a run prints whose it is.",
)


@dataclass(frozen=True)
class Recipe:
    """summary: one line. settings: flag -> value. published: what docs/formats.md lists."""

    name: str
    summary: str
    settings: dict[str, Any]
    published: dict[str, Any]

    def lines(self) -> list[str]:
        """What a user should know of the published model: one sentence or figure each."""
        published = self.published
        head = "No published reader of this recipe is known; each figure says whose it is."
        if "model" in published:
            head = f"Recipe of {published['model']}, made on {published['hardware']}."
        figures = [
            f"published: {each['set']} {exact_of(each)}F1 {each['f1']:.2f} ({each['of']})"
            for each in published["figures"]
        ]
        return [head, *figures, *published["notes"]]

    def row(self) -> list[str]:
        """Of the table of all recipes: name, parameters, first figure, summary."""
        figure = "-"
        for each in self.published["figures"][:1]:
            mark = "" if "model" in self.published else "*"
            figure = f"{each['f1']:.2f}{mark} {each['set']}"
        return [self.name, self.published["parameters"], figure, self.summary]


def exact_of(figure: dict[str, Any]) -> str:
    """A figure's EM and a space; nothing where F1 alone was published."""
    return f"EM {figure['exact']:.2f} " if "exact" in figure else ""


def names() -> list[str]:
    """The recipes there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Recipe:
    """The recipe of that name. Raises UserError where there is none."""
    if name not in names():
        raise unknown_name("--recipe", name, names())
    return Recipe(name, **yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def listing() -> str:
    """The table of all recipes."""
    rows = [["recipe", "parameters", "published F1", ""], *(load(name).row() for name in names())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *LEGEND])
