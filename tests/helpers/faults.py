"""The fault table: each row is a marker on the test that proves it, and docs/use/faults.md is written from the markers.

    @pytest.mark.fault("input", "a NUL byte in a data file", sees="one line with file and line", kept="everything")

`python tests/helpers/faults.py` writes the table. Tests are read, not imported, so every argument is a plain string.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOC = TESTS.parent / "docs" / "use" / "faults.md"

AREAS = {
    "crash": "Crashes, disks and folders",
    "numbers": "Numbers",
    "input": "Input",
    "security": "Hostile input",
    "models": "Models, layers and other libraries",
    "machines": "Machines",
}
HEAD = """# What goes wrong, what you see, what is kept

Search this page for what you saw. An error is one line. Nothing here ends in a traceback, or changes a
result silently. The test in the last column proves its row.
"""


@dataclass(frozen=True)
class Fault:
    """One row: what happens, what the user sees, what is kept, and the test that proves it."""

    area: str
    fault: str
    sees: str
    kept: str
    test: str


def faults(folder: Path = TESTS) -> Iterator[Fault]:
    """The rows of all test files, in the order of the files and of the tests inside them."""
    for file in sorted(folder.rglob("test_*.py"), key=lambda path: path.name):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for marker in node.decorator_list:
                    if isinstance(marker, ast.Call) and ast.unparse(marker.func) == "pytest.mark.fault":
                        yield _row(marker, f"{file.name}::{node.name}")


def _row(marker: ast.Call, test: str) -> Fault:
    area, fault = (ast.literal_eval(argument) for argument in marker.args)
    rest = {str(word.arg): ast.literal_eval(word.value) for word in marker.keywords}
    if area not in AREAS:
        raise ValueError(f"{test}: area {area!r}; expected one of {', '.join(AREAS)}")
    return Fault(area, fault, rest["sees"], rest["kept"], test)


def page(rows: list[Fault]) -> str:
    """The page: one table for each area that has rows."""
    parts = [HEAD]
    for area, title in AREAS.items():
        lines = [
            f"| {' | '.join(_cell(text) for text in (row.fault, row.sees, row.kept))} | `{row.test}` |"
            for row in rows
            if row.area == area
        ]
        if lines:
            head = ["| fault | what you see | what is kept | test |", "|---|---|---|---|"]
            parts.append("\n".join([f"## {title}", "", *head, *lines, ""]))
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    DOC.write_text(page(list(faults())), encoding="utf-8")
