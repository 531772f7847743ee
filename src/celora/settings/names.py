"""Names that files and plans carry."""

from __future__ import annotations

CONFIG_NAME = "celora_config.json"
PLAN_NAME = "celora_plan.json"
HEAD = "head"  # the name of the vocabulary projection among the layers of a plan
PRESET_NAMES = ("auto", "fast", "exact", "paper", "off")  # of `celora.settings.presets`, which imports torch
