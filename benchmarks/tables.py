"""Write the tables and pictures of README.md and the docs from committed rows: `python -m benchmarks.tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, a number in a sentence between `<!-- value: NAME -->`
and `<!-- end -->`; nothing between them is written by hand. The functions stand beside the rows, in the folder of the
question that they answer.
"""

from __future__ import annotations

import re
from pathlib import Path

import benchmarks.gradient.tables as gradient
import benchmarks.kernels.tables as kernels
import benchmarks.learning.tables as learning
import benchmarks.scale.tables as scale
import benchmarks.steps.tables as steps

ROOT = Path(__file__).parents[1]
TABLES = kernels.TABLES | gradient.TABLES | steps.TABLES | learning.TABLES | scale.TABLES
VALUES = steps.VALUES | learning.VALUES
PICTURES = {
    ROOT / "docs" / "measured" / name: picture
    for name, picture in (gradient.PICTURES | steps.PICTURES | learning.PICTURES).items()
}


def render(text: str) -> str:
    """The page with every table and every number in a sentence made anew."""
    text = re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"(<!-- value: (\w+) -->).*?(<!-- end -->)",
        lambda match: f"{match[1]}{VALUES[match[2]]()}{match[3]}",
        text,
    )


def written() -> dict[Path, str]:
    """Every page that has a table, and every picture, as the committed rows make them."""
    pages = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
    return {path: render(text) for path, text in pages.items() if "<!-- end -->" in text} | {
        path: picture() for path, picture in PICTURES.items()
    }


def main() -> None:
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
