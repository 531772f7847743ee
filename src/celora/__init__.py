"""celora speeds up LoRA fine-tuning. This file has the public names, and nothing else.

A name is imported when it is first used, so that `celora --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celora.attaching import attach, detach
    from celora.errors import CELoraError
    from celora.modeling.int8_base import quantise_base, restore_base
    from celora.modeling.report import AttachReport
    from celora.numerics.estimators.base import Estimator
    from celora.numerics.estimators.registry import register_estimator
    from celora.runtime.audit import AuditReport, audit
    from celora.runtime.callback import Callback
    from celora.runtime.graphs import compile_model
    from celora.runtime.original_base import original_base
    from celora.runtime.state import load_state, save_state
    from celora.settings.config import CELoraConfig

__version__ = "0.1.0"

__all__ = [
    "AttachReport",
    "AuditReport",
    "CELoraConfig",
    "CELoraError",
    "Callback",
    "Estimator",
    "attach",
    "audit",
    "compile_model",
    "detach",
    "load_state",
    "original_base",
    "quantise_base",
    "register_estimator",
    "restore_base",
    "save_state",
]

_DEFINED_IN = {
    "AttachReport": "modeling.report",
    "AuditReport": "runtime.audit",
    "CELoraConfig": "settings.config",
    "CELoraError": "errors",
    "Callback": "runtime.callback",
    "Estimator": "numerics.estimators.base",
    "attach": "attaching",
    "audit": "runtime.audit",
    "compile_model": "runtime.graphs",
    "detach": "attaching",
    "load_state": "runtime.state",
    "original_base": "runtime.original_base",
    "quantise_base": "modeling.int8_base",
    "register_estimator": "numerics.estimators.registry",
    "restore_base": "modeling.int8_base",
    "save_state": "runtime.state",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
