"""Every public `celora.name` on a page becomes a link to its reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"(?<!\[)`(celora(?:\.\w+)+)`")
_PUBLIC = re.findall(
    r"^::: (celora\.\S+)$",
    Path(__file__).with_name("reference").joinpath("index.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
_TARGETS = {f"celora.{path.rpartition('.')[2]}": path for path in _PUBLIC} | {path: path for path in _PUBLIC}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    parts = _FENCE.split(markdown)
    parts[::2] = [_NAME.sub(_link, part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str]) -> str:
    # A public name may be a module's, too (celora.attach): it means the object, which stands where it is defined.
    target = _TARGETS.get(found[1])
    return f"[`{found[1]}`][{target}]" if target else found[0]
