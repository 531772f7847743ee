"""The rooms of the package, and the arrows between them as the imports draw them.

`python tests/helpers/house.py` draws docs/develop/rooms.svg; `tests/project/test_house.py` checks arrows and picture.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "celora"
PICTURE = SOURCE.parents[1] / "docs" / "develop" / "rooms.svg"
ROOMS = [
    "errors", "files", "borrowed", "machine", "weights", "kernels", "numerics", "settings", "modeling", "runtime",
    "planning", "attaching", "fsdp", "integrations", "run", "train", "studies", "cli", "__main__",
]  # fmt: skip
FRONT = "planning"  # `import celora` offers what the rooms up to here define, and the front door


def imports(path: Path) -> Iterator[str]:
    """The modules of celora that a file imports, at its top or inside a function.

    Imports for types only do not count.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    only_types = {inner for node in typed for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in only_types and (node.module or "").startswith("celora"):
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if is_module(name) else str(node.module) for name in names)
        if isinstance(node, ast.Import) and node not in only_types:
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "celora")


def external(path: Path) -> set[str]:
    """The packages of others that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name.partition(".")[0] for name in found} - {"celora", *sys.stdlib_module_names}


def is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def modules() -> dict[str, Path]:
    """Module -> its file."""
    found = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else FRONT


def between_rooms() -> dict[str, set[str]]:
    """Room -> the other rooms that its files import."""
    arrows: dict[str, set[str]] = {name: set() for name in ROOMS}
    for name, path in modules().items():
        if name != "celora":
            arrows[room(name)] |= {room(other) for other in imports(path)} - {room(name)}
    return arrows


def picture() -> str:
    """The house as an SVG: a room stands above the rooms that it imports.

    An arrow that follows from two others is left out.
    """
    arrows = between_rooms()
    reached: dict[str, set[str]] = {}
    for name in ROOMS:  # in this order, a room comes after the rooms that it imports
        reached[name] = arrows[name].union(*(reached[other] for other in arrows[name]))
    level: dict[str, int] = {}
    for name in ROOMS:
        level[name] = 1 + max((level[other] for other in arrows[name]), default=-1)
    drawn = {name: arrows[name].difference(*(reached[other] for other in arrows[name])) for name in ROOMS}
    width, step, size, margin = 560, 56, (128, 30), 24
    height = step * (max(level.values()) + 1) + margin
    place = {}
    for floor in set(level.values()):
        on_it = [name for name in ROOMS if level[name] == floor]
        for i, name in enumerate(on_it):
            place[name] = (i + 1) * width / (len(on_it) + 1), height - margin - step * floor - size[1] / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="14" text-anchor="middle">',
        "<style>.page{fill:#fff}.room{fill:#e8f1f8;stroke:#0072b2}line{stroke:#777}text{fill:#222}",
        "@media (prefers-color-scheme:dark){.page{fill:#161b22}.room{fill:#12344d}text{fill:#eee}}</style>",
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#777"/></marker></defs>',
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for name in ROOMS:
        for other in sorted(drawn[name]):
            (x1, y1), (x2, y2) = place[name], place[other]
            parts.append(
                f'<line x1="{x1:.0f}" y1="{y1 + size[1] / 2:.0f}" x2="{x2:.0f}" y2="{y2 - size[1] / 2:.0f}" '
                'marker-end="url(#end)"/>'
            )
    for name, (x, y) in place.items():
        parts.append(
            f'<rect class="room" x="{x - size[0] / 2:.0f}" y="{y - size[1] / 2:.0f}" width="{size[0]}" '
            f'height="{size[1]}" rx="6"/><text x="{x:.0f}" y="{y + 5:.0f}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
