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


@dataclass(frozen=True)
class Recipe:
    """summary: one line. settings: flag -> value. published: model, hardware, figures, notes."""

    name: str
    summary: str
    settings: dict[str, Any]
    published: dict[str, Any]

    def lines(self) -> list[str]:
        """What a user should know of the published model: one sentence or figure each."""
        published = self.published
        head = f"Recipe of {published['model']}, made on {published['hardware']}."
        figures = [
            f"published: {each['set']} EM {each['exact']:.2f} F1 {each['f1']:.2f} ({each['of']})"
            for each in published["figures"]
        ]
        return [head, *figures, *published["notes"]]


def names() -> list[str]:
    """The recipes there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Recipe:
    """The recipe of that name. Raises UserError where there is none."""
    if name not in names():
        raise unknown_name("--recipe", name, names())
    return Recipe(name, **yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def listing() -> str:
    """A line for each recipe."""
    found = [load(name) for name in names()]
    width = max(len(recipe.name) for recipe in found)
    return "\n".join(f"{recipe.name:{width}}  {recipe.summary}" for recipe in found)
