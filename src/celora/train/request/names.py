"""The names that `trl sft` and `accelerate launch` take, read from their source files without importing them.

Importing TRL takes seconds, and a misspelt flag should be refused at once. The code follows the `from ... import` lines
to each class, including the lines for type checkers. If it cannot follow a source, the answer is None. The check then
happens after the import, in `celora.train.request.fields.known_fields`, which decides in any case.
"""

from __future__ import annotations

import ast
import functools
from importlib.util import find_spec
from pathlib import Path

# The dataclasses that hold the options of `trl sft`.
TRLS = ("ScriptArguments", "DatasetMixtureConfig", "SFTConfig", "ModelConfig")
_NO_FIELDS = ("ClassVar", "InitVar", "KW_ONLY")


@functools.cache
def trl_names() -> frozenset[str] | None:
    """The fields of TRL's four dataclasses, or None if the sources do not show all of them."""
    found: set[str] = set()
    for name in TRLS:
        fields = _fields("trl", name)
        if fields is None:
            return None
        found |= fields
    return frozenset(found)


@functools.cache
def launcher_names() -> frozenset[str]:
    """The options that `trl sft` passes on to `accelerate launch`."""
    found = {"accelerate_config"}
    tree = _parse("accelerate.commands.launch")
    for call in ast.walk(tree) if tree else ():
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            flags = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            found |= {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    return frozenset(found)


def _fields(module: str, name: str) -> set[str] | None:
    """The fields of the dataclass called `name` in `module`, and of its base classes."""
    place = _find(module, name, frozenset())
    if place is None:
        return None
    home, node = place
    found: set[str] = set()
    for base in node.bases:
        inherited = _fields(home, base.id) if isinstance(base, ast.Name) else None
        if inherited is None:
            return None
        found |= inherited
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            kind = ast.unparse(line.annotation)
            found |= set() if any(word in kind for word in _NO_FIELDS) else {line.target.id}
    return found


def _find(module: str, name: str, seen: frozenset[tuple[str, str]]) -> tuple[str, ast.ClassDef] | None:
    """The module that defines class `name`, and the class. The search starts in `module` and follows imports."""
    tree = _parse(module)
    if tree is None or (module, name) in seen:
        return None
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    place = _find(_absolute(module, node), alias.name, seen | {(module, name)})
                    if place is not None:
                        return place
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that an import line in `module` names."""
    if not node.level:
        return node.module or ""
    source = _source(module)
    up = node.level - (source is not None and source.name == "__init__.py")
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - up], *((node.module,) if node.module else ())])


@functools.cache
def _parse(module: str) -> ast.Module | None:
    source = _source(module)
    try:
        return None if source is None else ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _source(module: str) -> Path | None:
    """The source file of a module. It asks `find_spec` for the outermost package only, since that imports nothing."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    for root in (spec.submodule_search_locations if spec else None) or ():
        place = Path(root).joinpath(*rest)
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return file
    return None
