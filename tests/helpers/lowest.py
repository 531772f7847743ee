"""The lowest versions that pyproject.toml allows, as a constraints file for pip: `python tests/lowest.py > FILE`.

`celora>=1.2` becomes `celora==1.2`. pip chooses the versions of everything else: what these packages need in turn, and
what runs the tests.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

_FLOOR = re.compile(r"([\w.-]+)>=([\w.]+)")


def lowest() -> list[str]:
    """`name==version` of each package that users need, including those for quantised bases."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["quantised"]]
    floors = [_FLOOR.fullmatch(requirement) for requirement in requirements]
    return [f"{floor[1]}=={floor[2]}" for floor in floors]


if __name__ == "__main__":
    print("\n".join(lowest()))
