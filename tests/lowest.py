"""The lowest versions that pyproject.toml allows, as a constraints file for pip: `python tests/lowest.py > FILE`.

`celora>=1.2` becomes `celora==1.2`. pip then chooses what these need in turn as it always does.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path


def lowest(project: dict[str, object]) -> Iterator[str]:
    """`name==version; marker` of each requirement of users; what only runs the tests is as new as can be."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    for requirement in (*project["dependencies"], *extras["quantised"]):  # type: ignore[misc]
        name, floor, marker = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(?:>=([\w.]+))?(;.*)?", requirement).groups()  # type: ignore[union-attr]
        if floor:
            yield f"{name}=={floor}{marker or ''}"


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(lowest(project)))
