"""Saves the state of the estimators in a checkpoint, so that a resumed run continues exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from celora.errors import CELoraError
from celora.files import replacing
from celora.machine.processes import in_company
from celora.numerics.estimators import Estimator
from celora.runtime import target_error
from celora.runtime.attachment import Attachment, require
from celora.settings.config import CELoraConfig
from celora.settings.names import HEAD

STATE_NAME = "celora_state.safetensors"
_ERROR = "relative_error"
_OVER_BOUND = "over_bound"
_CONFIG, _MOVES = "config", "moves"
N = TypeVar("N", int, float)


def save_state(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the step count and each layer's selection and measured error to `celora_state.safetensors` in `folder`.

    The folder is made if it is not there. Call it between optimizer steps. Factors are not written, because they
    follow from the weights and the seed. If several processes train together, and each selects by its own
    gradients, call it in all of them. The others write `celora_state_1.safetensors` and so on. With `synchronise`
    all have the same state, and only the first one writes.
    """
    attachment = require(model)
    target = Path(folder) / own_name(attachment)
    if attachment.config.synchronise and in_company() and dist.get_rank() > 0:
        return target
    state: dict[str, Tensor] = {"step": torch.tensor(attachment.clock.step)}
    for name, graft in attachment.grafts.items():
        known = graft.estimator.state_dict() | target_error.state_dict(graft.estimator)
        state |= {f"{name}:{key}": value.contiguous() for key, value in known.items()}
    for name in attachment.forwards:
        state |= {f"{name}:{key}": value for key, value in attachment.forwards.state_dict(name).items()}
    for name, error in attachment.relative_errors.items():
        state[f"{name}:{_ERROR}"] = torch.tensor(error, dtype=torch.float64, device="cpu")
    for name, times in attachment.over_bound.items():
        state[f"{name}:{_OVER_BOUND}"] = torch.tensor(times)
    with contextlib.suppress(OSError):  # then the next line says why it cannot be written
        target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        try:
            known_by = {_CONFIG: _config(attachment), _MOVES: attachment.ladder.to_json()}
            save_file(state, temporary, metadata=known_by)
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return target


def load_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Restore what `save_state` wrote: all of it, or on an error nothing. Attach the same configuration first.

    A process without a file of its own reads the first process's file.

    Raises:
        CELoraError: the file is missing or damaged, or was made with another configuration.
    """
    attachment = require(model)
    own, file = Path(folder) / own_name(attachment), Path(folder) / STATE_NAME
    if own.is_file():
        file = own
    elif not file.is_file():
        raise CELoraError(f"no {STATE_NAME} in {folder}; save one with celora.save_state(model, folder).")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            # Copies: what is mapped would keep the file open, and Windows then removes no old checkpoint.
            state = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise CELoraError(f"{file} is damaged: {error}") from None
    made_with = metadata.get(_CONFIG)
    if made_with is None or "step" not in state:
        raise CELoraError(f"{file} was not made by celora.save_state.")
    if differ := _different(made_with, attachment):
        raise CELoraError(
            f"{file} was made with another configuration, with another {' and '.join(differ)}. Attach that one to "
            "resume; the file has it as JSON in its metadata."
        )
    step = _number(file, "step", state.pop("step"), int)
    layers: dict[str, dict[str, Tensor]] = {name: {} for name in (*attachment.grafts, HEAD)}
    for key, value in state.items():
        name, _, field = key.rpartition(":")
        if name not in layers:
            raise CELoraError(f"{file} holds a selection for {name!r}, which is not estimated in this model.")
        layers[name][field] = value
    errors = {
        name: _number(file, _ERROR, fields.pop(_ERROR), float) for name, fields in layers.items() if _ERROR in fields
    }
    over_bound = {
        name: _number(file, _OVER_BOUND, fields.pop(_OVER_BOUND), int)
        for name, fields in layers.items()
        if _OVER_BOUND in fields
    }
    forwards = {
        name: {key: fields.pop(key) for key in list(fields) if key.startswith("forward_")}
        for name, fields in layers.items()
    }
    for name, graft in attachment.grafts.items():
        _restore(graft.estimator.clone(), layers[name])  # refuses a state that does not fit, before anything is changed
    try:
        attachment.ladder.load(metadata.get(_MOVES, "[]"), layers)
    except CELoraError as error:
        raise CELoraError(f"{file} is damaged: {error}") from None
    for name, graft in attachment.grafts.items():
        _restore(graft.estimator, layers[name])
        graft.take_error()  # left by an interrupted refresh
    for name in attachment.forwards:
        attachment.forwards.load_state_dict(name, forwards[name])
    if attachment.forward is not None:
        attachment.forward.take_error()
        attachment.forward.keep_ratio = attachment.ladder.keeps(HEAD, attachment.config.head_keep_ratio)
    attachment.relative_errors, attachment.over_bound = errors, over_bound
    attachment.clock.step = step
    attachment.agree(list(attachment.grafts))
    attachment.set_modes(step)


def saved_config(folder: str | os.PathLike[str]) -> CELoraConfig | None:
    """The configuration of the state in `folder`; None if there is none to be read."""
    try:
        with safe_open(Path(folder) / STATE_NAME, framework="pt") as opened:
            return CELoraConfig.from_dict(json.loads((opened.metadata() or {}).get(_CONFIG, "")))
    except (OSError, SafetensorError, CELoraError, ValueError, TypeError):
        return None


def times_differ(before: CELoraConfig | None, now: CELoraConfig) -> bool:
    """Whether these are one preset, settled by different times: on another machine, or on a busy one."""
    if before is None or before == now:
        return False
    own, theirs = (
        {name: fields for name, fields in config.overrides.items() if not name.startswith("=")}
        for config in (before, now)
    )
    alike = dataclasses.replace(before, overrides=now.overrides, head_keep_ratio=now.head_keep_ratio)
    return own == theirs and alike == now


def _different(made_with: str, attachment: Attachment) -> list[str]:
    """The fields in which this configuration is not the attached one."""
    now = attachment.config.to_dict()
    try:
        before = CELoraConfig.from_dict(json.loads(made_with)).to_dict()
    except (CELoraError, ValueError, TypeError):
        return ["kind of configuration"]
    return [name for name, value in now.items() if before.get(name) != value]


def _restore(estimator: Estimator, state: dict[str, Tensor]) -> None:
    target_error.load_state_dict(estimator, state)
    estimator.load_state_dict(state)


def _number(file: Path, name: str, value: Tensor, kind: type[N]) -> N:
    try:
        return kind(value.item())
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:  # not one number, or no count
        raise CELoraError(f"{file} is damaged: {name} is no number: {error}") from None


def own_name(attachment: Attachment) -> str:
    """The name of this process's state file."""
    if attachment.config.synchronise or not in_company() or dist.get_rank() == 0:
        return STATE_NAME
    stem, suffix = STATE_NAME.split(".")
    return f"{stem}_{dist.get_rank()}.{suffix}"


def _config(attachment: Attachment) -> str:
    return json.dumps(attachment.config.to_dict(), sort_keys=True)
