"""Write the tables and pictures of README.md and the docs from committed rows: `python -m benchmarks.tables`.

On a page, a table is between `<!-- table: NAME -->` and `<!-- end -->`, and a number in a sentence is between
`<!-- value: NAME -->` and `<!-- end -->`. Nothing between these marks is written by hand. The function of a table is in
the folder of its rows, in `tables.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import benchmarks.kernels.tables as kernels
import benchmarks.learning.tables as learning
import benchmarks.scale.tables as scale
import benchmarks.steps.tables as steps

ROOT = Path(__file__).parents[1]
TABLES = kernels.TABLES | steps.TABLES | learning.TABLES | scale.TABLES
VALUES = steps.VALUES | learning.VALUES
PICTURES = {
    ROOT / "docs" / "measured" / name: picture for name, picture in (steps.PICTURES | learning.PICTURES).items()
}


def render(text: str) -> str:
    """The page with all its tables and values made again."""
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
    """The content of every page with a table, and of every picture, made from the committed rows."""
    pages = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
    return {path: render(text) for path, text in pages.items() if "<!-- end -->" in text} | {
        path: picture() for path, picture in PICTURES.items()
    }


def main() -> None:
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
