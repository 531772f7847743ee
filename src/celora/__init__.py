"""celora: LoRA fine-tuning with an estimated, cheaper backward pass. The public names, nothing else."""

from celora.attach import AttachReport, attach, detach
from celora.audit import AuditReport, audit
from celora.callback import Callback
from celora.config import CELoraConfig
from celora.errors import CELoraError
from celora.plan import Plan
from celora.planner import make_plan
from celora.state import load_state, save_state

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
