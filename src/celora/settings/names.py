"""Names that files carry."""

from __future__ import annotations

CONFIG_NAME = "celora_config.json"
_NO_PLANS = "preset auto decides by a rule, by timing, and while it trains"
# Options, arguments and commands of earlier versions, and what is there instead.
GONE = dict.fromkeys(("plan", "fidelity", "memory_limit", "batches"), _NO_PLANS)
HEAD = "head"  # the name of the vocabulary projection among the layers
PRESET_NAMES = ("auto", "fast", "exact", "paper", "off")  # of `celora.settings.presets`, which imports torch
