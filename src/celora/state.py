"""Save what the estimators know beside a checkpoint, so that a resumed run goes on as if it had never stopped."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from celora.attach import require
from celora.errors import CELoraError

STATE_NAME = "celora_state.safetensors"
_ERROR = "relative_error"


def save_state(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the step count and each layer's selection and measured error to `celora_state.safetensors` in `folder`.

    Call it between optimizer steps. Factors are not written: they follow from the weights and the seed.
    """
    attachment = require(model)
    state: dict[str, Tensor] = {"step": torch.tensor(attachment.clock.step)}
    for name, graft in attachment.grafts.items():
        state |= {f"{name}:{key}": value.contiguous() for key, value in graft.estimator.state_dict().items()}
    state |= {f"{name}:{_ERROR}": error for name, error in attachment.relative_errors.items()}
    target = Path(folder) / STATE_NAME
    temporary = target.with_name(target.name + ".tmp")
    save_file(state, temporary)
    temporary.replace(target)
    return target


def load_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Take over what `save_state` wrote. The model must have the same configuration attached.

    Raises:
        CELoraError: no such file, a damaged one, or one made with another configuration.
    """
    attachment = require(model)
    file = Path(folder) / STATE_NAME
    if not file.is_file():
        raise CELoraError(f"no {STATE_NAME} in {folder}; save one with celora.save_state(model, folder).")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise CELoraError(f"{file} is damaged: {error}") from None
    step = int(state.pop("step", torch.tensor(-1)))
    layers: dict[str, dict[str, Tensor]] = {name: {} for name in attachment.grafts}
    for key, value in state.items():
        name, _, field = key.rpartition(":")
        if name not in layers:
            raise CELoraError(f"{file} holds a selection for {name!r}, which is not estimated in this model.")
        layers[name][field] = value
    if step < 0:
        raise CELoraError(f"{file} holds no step count; it was not made by celora.save_state.")
    errors = {name: of.pop(_ERROR) for name, of in layers.items() if _ERROR in of}
    device = next((p.device for p in attachment.parameters()), torch.device("cpu"))
    for name, graft in attachment.grafts.items():
        graft.estimator.load_state_dict({key: value.to(device) for key, value in layers[name].items()})
    attachment.relative_errors = {name: error.to(device) for name, error in errors.items()}
    attachment.clock.step = step
    attachment.set_modes(step)
