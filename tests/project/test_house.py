"""The rooms of the package point one way: each imports only rooms that stand before it in this list."""

from __future__ import annotations

from pathlib import Path

from house import PICTURE, ROOMS, imports, modules, picture, room

ROOT = Path(__file__).parents[2]


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


def test_the_picture_shows_the_imports() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run: python tests/helpers/house.py"


def test_the_map_has_a_paragraph_for_every_room() -> None:
    page = (ROOT / "docs" / "develop" / "map.md").read_text(encoding="utf-8")
    assert [name for name in ROOMS if name != "__main__" and f"**`{name}`**" not in page] == []
