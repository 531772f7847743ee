"""celora: LoRA fine-tuning with an estimated, cheaper backward pass. The public names, nothing else.

A name is imported when it is first used, so that `celora --help` need not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celora.attaching import attach, detach
    from celora.errors import CELoraError
    from celora.modeling.report import AttachReport
    from celora.planning.audit import AuditReport, audit
    from celora.planning.plan import Plan
    from celora.planning.planner import make_plan
    from celora.runtime.callback import Callback
    from celora.runtime.state import load_state, save_state
    from celora.settings.config import CELoraConfig

__version__ = "0.1.0"

__all__ = [
    "AttachReport",
    "AuditReport",
    "CELoraConfig",
    "CELoraError",
    "Callback",
    "Plan",
    "attach",
    "audit",
    "detach",
    "load_state",
    "make_plan",
    "save_state",
]

_DEFINED_IN = {
    "attach": ("AttachReport", "attach", "detach"),
    "audit": ("AuditReport", "audit"),
    "callback": ("Callback",),
    "config": ("CELoraConfig",),
    "errors": ("CELoraError",),
    "plan": ("Plan",),
    "planner": ("make_plan",),
    "state": ("load_state", "save_state"),
}
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_MODULE_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds a submodule to its name, but celora.attach and celora.audit are functions.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Lazy
