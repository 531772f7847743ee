"""The lowest versions that pyproject.toml allows, as a constraints file for pip: `python lowest.py '[app]' > FILE`.

`celora>=1.2` becomes `celora==1.2`. pip chooses the versions of everything else: what these packages need in turn, and
what runs the tests.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_FLOOR = re.compile(r"([\w.-]+)>=([\w.]+)")


def lowest(*extras: str) -> dict[str, str]:
    """The lowest version of each package that the library needs, with these extras, whose versions may be higher."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"]]
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    floors = [_FLOOR.fullmatch(requirement) for requirement in requirements]
    return {floor[1]: floor[2] for floor in floors}


if __name__ == "__main__":
    named = re.findall(r"\w+", "".join(sys.argv[1:]))
    print("\n".join(f"{name}=={version}" for name, version in lowest(*named).items()))
