"""The rooms of the package point one way: each imports only what stands above it in this list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "celora"
ROOMS = [
    "errors", "files", "borrowed", "machine", "weights", "kernels", "numerics", "settings", "modeling", "runtime",
    "planning", "attaching", "fsdp", "train", "studies", "cli", "__main__",
]  # fmt: skip
FRONT = "planning"  # `import celora` gives what the rooms up to here and the front door define


def imports(path: Path) -> Iterator[str]:
    """The modules of celora that a file imports, at its top or inside a function, but for what only types need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    only_types = {inner for node in typed for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in only_types and (node.module or "").startswith("celora"):
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if is_module(name) else str(node.module) for name in names)
        if isinstance(node, ast.Import) and node not in only_types:
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "celora")


def is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def modules() -> dict[str, Path]:
    found = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else FRONT


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in modules()} == set(ROOMS)


def test_no_arrow_points_up() -> None:
    order = {name: number for number, name in enumerate(ROOMS)}
    arrows = [(name, other) for name, path in modules().items() if name != "celora" for other in imports(path)]
    assert len(arrows) > 300
    assert [f"{name} -> {other}" for name, other in arrows if order[room(other)] > order[room(name)]] == []


def test_there_is_no_circle() -> None:
    arrows = {name: set(imports(path)) - {name} for name, path in modules().items() if name != "celora"}
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert sorted(arrows) == []
