"""Loads a trained adapter onto its base model, from the output folder of a run.

run.json names the base model, its revision, dtype and quantisation. A folder by another tool has no run.json; there
adapter_config.json names the base model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from celora.errors import CELoraError
from celora.files import read_json
from celora.machine.device import default_device
from celora.train.dtype import dtype_to_use
from celora.train.loading import check_model_folder, load_adapter, load_model, read_tokenizer, with_folder
from celora.train.output.folder import RUN, OutputFolder
from celora.train.request.arguments import TrainRequest, check_record, make_request

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Trained:
    """A PEFT model in evaluation mode, its tokenizer, the adapter's folder and the base model."""

    model: Any
    tokenizer: Any
    folder: Path
    base: str  # the base model's name, folder or GGUF file
    raw: bool = False  # prompts come without the chat template, as where it was trained on texts


def load_trained(folder: Path, base: str | None = None) -> Trained:
    """Load the adapter in `folder` onto its base model, on the device that the Trainer would choose.

    Args:
        folder: the output folder of a run, a checkpoint in it, or a folder that PEFT has saved.
        base: name or folder of the base model; None for the one that the adapter was trained on.

    Raises:
        CELoraError: the adapter or the base model is missing, or the two do not fit.
    """
    config = adapter_config(folder)
    request = request_of(folder, config, base)
    tokenizer = tokenizer_of(folder, request)
    device = torch.device("cpu") if request.train.get("use_cpu") else default_device()
    request = replace(request, lora=request.lora | {"dtype": dtype_to_use(request, device)})
    model = load_adapter(load_model(request), folder).eval()
    if getattr(model, "hf_device_map", None) is None:
        model.to(device)
    raw = (_record(folder) or {}).get("turns") is False
    return Trained(model, tokenizer, folder, str(request.given["model"]), raw)


def tokenizer_of(folder: Path, request: TrainRequest) -> Any:
    """The tokenizer of the adapter in `folder`: its own or, where none was saved with it, the base model's."""
    if (folder / "tokenizer_config.json").is_file():
        return read_tokenizer(str(folder))
    return read_tokenizer(request.model, revision=request.lora["model_revision"])


def adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises CELoraError if it or the adapter's weights are missing."""
    if not folder.is_dir():
        raise CELoraError(f"{str(folder)!r}: no such folder; give the --output folder of celora train")
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        saved = OutputFolder(folder).last_checkpoint()
        then = "give the --output folder of celora train"
        if saved:
            then = f"give its newest checkpoint, {str(saved[0])!r}, or finish the run with --resume"
        raise CELoraError(f"{str(folder)!r} holds no finished adapter: it has no {lacking[0]}; {then}")
    found = read_json(folder / CONFIG)
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise CELoraError(f"{str(folder / CONFIG)!r} is not a LoRA adapter's: peft_type is {kind!r}, expected 'LORA'")
    return found


def unfinished(folder: Path) -> str:
    """Says that a finished run was continued, and that its newer steps are not in `folder`; empty if all are."""
    saved = (_record(folder) or {}).get("adapter_step")
    newest = OutputFolder(folder).last_checkpoint() if isinstance(saved, int) else None
    if newest is None or newest[1]["step"] <= saved:
        return ""
    return (
        f"{str(folder)!r} holds the adapter of step {saved}. The run was continued: its newest steps are in "
        f"{str(newest[0])!r}, and --resume finishes it."
    )


def text_field_of(folder: Path) -> str | None:
    """The column that the run in `folder` read as `text`; None for `text` of rows that nothing else fits."""
    record = _record(folder)
    return None if record is None else make_request(record["given"]).train.get("dataset_text_field")


def _record(folder: Path) -> dict[str, Any] | None:
    """The run.json of the run that trained the adapter in `folder`, or None."""
    folder = folder.resolve()
    run = folder if (folder / RUN).is_file() or not folder.name.startswith("checkpoint-") else folder.parent
    record = OutputFolder(run).run()
    if record is not None:
        check_record(run / RUN, record)
    return record


def request_of(folder: Path, config: dict[str, Any], base: str | None) -> TrainRequest:
    """The request of the run that trained the adapter in `folder`, with the dtype that the run settled on."""
    record = _record(folder)
    if record is None:
        was = config.get("base_model_name_or_path")
        given: dict[str, Any] = {"model": was, "model_revision": config.get("revision") or "main"}
        given |= {"data": str(folder), "output": str(folder)}  # required, but not used here
        dtype = "auto"
    else:
        given, dtype = record["given"], record["lora"].get("dtype", "auto")
    if base is not None:
        given = given | {"model": base, "model_revision": "main"}
    elif not given["model"] or (Path(given["model"]).is_absolute() and not Path(given["model"]).exists()):
        raise CELoraError(
            f"{str(folder)!r} was trained on {given['model']!r}, which is not there; give --model with its folder or "
            "Hugging Face name"
        )
    request = with_folder(make_request(given))
    check_model_folder(request.model)
    return replace(request, lora=request.lora | {"dtype": dtype})
