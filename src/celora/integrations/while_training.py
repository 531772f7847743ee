"""The mechanism under every integration: a callback attaches celora when a Trainer begins to train, and detaches it at
the end. So what the program saves afterwards is saved by plain PEFT."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from celora.attaching import attach, detach
from celora.errors import CELoraError
from celora.integrations import DEFAULT
from celora.modeling.report import AttachReport
from celora.runtime.attachment import find, require
from celora.runtime.callback import Callback
from celora.runtime.state import saved_config, times_differ
from celora.settings.config import CELoraConfig
from celora.settings.names import PRESET_NAMES
from celora.settings.presets import resolve, ruled


class AttachWhileTraining(Callback):
    """Attach celora to the PEFT model that a Trainer trains, from the beginning of the training to its end.

    A line on stderr says what was attached. An attachment that the program has made itself stays as it is. A model
    without adapters trains as without celora, and a line says so. Otherwise it is a `celora.Callback`.

    Args:
        settings: what a user writes under `celora:`. A preset (`exact`); a mapping with `preset` and fields that
            concern all layers (`{"preset": "auto", "labelled_head": False}`); or a mapping of `CELoraConfig` fields.

    Raises:
        CELoraError: for an unknown preset or field.
    """

    def __init__(self, settings: object = DEFAULT) -> None:
        super().__init__()
        self.config, self.changes = read_settings(settings)
        self._ours: nn.Module | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **more: Any
    ) -> None:
        """Attach celora, and continue like `celora.Callback`: it restores celora's state when training resumes."""
        said = self._begin(model, self._timed_before(args, state))
        if state.is_world_process_zero:
            print(f"celora: {said}", file=sys.stderr, flush=True)
        super().on_train_begin(args, state, control, model=model, **more)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Detach what this callback has attached."""
        if self._ours is not None:
            detach(self._ours)
            self._ours = None

    def _timed_before(self, args: TrainingArguments, state: TrainerState) -> CELoraConfig | None:
        """What `auto` or `fast` became when the training that is resumed began, perhaps on another machine.

        None if other fields have changed since, which `load_state` refuses.
        """
        if state.global_step == 0 or self.config not in ("auto", "fast"):
            return None
        asked = ruled(self.config, resolve(self.config, self.changes), self.changes)
        found = (saved_config(folder) for folder in self._checkpoints(args, state))
        before = next((config for config in found if config is not None), asked)
        if "head_keep_ratio" in self.changes and before.head_keep_ratio != asked.head_keep_ratio:
            return None
        return before if before == asked or times_differ(before, asked) else None

    def _begin(self, model: nn.Module, resumed: CELoraConfig | None) -> str:
        name = type(getattr(model, "get_base_model", lambda: model)()).__name__
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            return f"{name} has no PEFT adapter, so it trains as without celora."
        existing = find(model)
        if existing is not None and not existing.for_a_training:
            return f"{name} was attached by the program itself, which decides."
        report = attach(model, self.config, **self.changes) if resumed is None else attach(model, resumed)
        require(model).for_a_training = True
        self._ours = model
        preset = f"preset {self.config}" if isinstance(self.config, str) else "a configuration"
        return f"{preset} attached to {name}: {in_one_line(report)}."


def read_settings(settings: object) -> tuple[str | CELoraConfig, dict[str, Any]]:
    """What to give to `celora.attach`: a preset with changes, or a configuration. `AttachWhileTraining` says of what.

    YAML reads `off` as false, which is taken for the preset.
    """
    if settings is False or isinstance(settings, str):
        settings = {"preset": settings}
    if not isinstance(settings, Mapping):
        raise CELoraError(f"celora: {settings!r}; expected a preset ({', '.join(PRESET_NAMES)}) or a mapping.")
    fields = {str(name): value for name, value in settings.items()}
    preset = fields.pop("preset", None)
    if preset is None:
        return CELoraConfig.from_dict(fields), {}
    preset = "off" if preset is False else str(preset)
    resolve(preset, fields)  # so that a mistake is an error now, and not when training begins
    return preset, fields


def in_one_line(report: AttachReport) -> str:
    """How many layers are estimated, and how many keep PEFT's backward, with the most frequent reason."""
    layers = len(report.layers)
    if not report.estimated:
        own = report.besides or "the gradient is LoRA's own"
        said = f"none of {layers} frozen layers estimated, {own}"
    else:
        said = f"{len(report.estimated)} of {layers} frozen layers estimated"
    if report.skipped:
        ((reason, _),) = Counter(report.skipped.values()).most_common(1)
        said += f"; {len(report.skipped)} cannot be ({reason})"
    return said
