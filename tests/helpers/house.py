"""The rooms of the package, from the ground up, and what its files import. Imports for types count."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
ROOMS = [
    "errors", "files", "borrowed", "machine", "weights", "kernels", "numerics", "settings", "modeling", "runtime",
    "attaching", "fsdp", "integrations", "run", "train", "studies", "cli", "__main__",
]  # fmt: skip


def modules() -> dict[str, Path]:
    """Module -> its file. `celora` itself, which offers names of many rooms, is in none."""
    found = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items() if name != "celora.__init__"}


def room(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function, celora's and others'."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{name.name}" for name in node.names}
            own = {name for name in names if is_module(name)}
            found |= own if own == names else {str(node.module), *own}
    return found


def is_module(name: str) -> bool:
    path = SOURCE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()
