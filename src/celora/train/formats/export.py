"""`celora export`: a trained adapter as a folder that another program takes.

The folder appears whole or not at all, after everything in it was read back. celora_export.json marks it as ours, so
that --overwrite replaces nothing else.
"""

from __future__ import annotations

import copy
import json
import shlex
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import celora
from celora.errors import CELoraError, unknown
from celora.files import replacing, replacing_folder
from celora.train.formats.gguf_file import read_header
from celora.train.formats.merged_folder import base_folder, write_folder
from celora.train.formats.mlx_lora import write_mlx
from celora.train.formats.saved_adapter import PREFIX, SavedAdapter
from celora.train.loading import check_layers, checked_config, gguf_of
from celora.train.request.arguments import TrainRequest
from celora.train.use.trained import adapter_config, request_of, tokenizer_of

Format = Literal["gguf", "safetensors", "mlx"]
MARK = "celora_export.json"
ADAPTER, MODEL, MODELFILE = "adapter.gguf", "model.gguf", "Modelfile"


@dataclass(frozen=True)
class Export:
    """What was written: the folder or GGUF file, the files in it, and how many tensors were read back and compared.

    `command` runs it with llama.cpp, if it is GGUF.
    """

    output: Path
    files: list[str]
    tensors: int
    command: str | None = None


def export(
    folder: Path,
    to: str,
    *,
    merged: bool = False,
    gguf: Path | None = None,
    outtype: str | None = None,
    output: Path | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the adapter in `folder`, or the model that it is merged into, for another program.

    Args:
        folder: the output folder of a run, a checkpoint in it, or a folder that PEFT has saved.
        to: "gguf" for llama.cpp, "safetensors" for Transformers, or "mlx" for mlx-lm.
        merged: write the whole model.
        gguf: the base model as GGUF, which a merged GGUF file needs; None for the file that was trained on, if any.
        outtype: of a merged GGUF file: "f16", "q8_0" or "f32"; None for "f16".
        output: the folder to write, or a name that ends in ".gguf" for that file alone; None for a folder beside
            `folder`.
        model: where the base model is now; None for where it was.
        overwrite: replace an earlier export.

    Raises:
        CELoraError: the adapter or its base model cannot be read, or the format cannot hold them.
    """
    if to not in get_args(Format):
        raise unknown("format", to, get_args(Format))
    if to == "gguf" and find_spec("gguf") is None:
        raise CELoraError("--to gguf needs the package gguf, which is not installed; pip install gguf")
    if to == "safetensors" and not merged:
        raise CELoraError(
            f"the adapter in {str(folder)!r} is in safetensors already; give --merged for the whole model"
        )
    if to == "mlx" and merged:
        raise CELoraError(
            "--to mlx writes the adapter alone; --merged --to safetensors writes a model that mlx-lm loads"
        )
    if outtype is not None and not (merged and to == "gguf"):
        raise CELoraError(f"--outtype {outtype} is for a merged GGUF file; give --merged --to gguf, or leave it out")
    if gguf is not None and to != "gguf":
        raise CELoraError(f"--gguf {str(gguf)!r} is for --to gguf; --to {to} takes no GGUF file, so leave it out")
    if gguf is not None and not gguf.is_file():
        raise CELoraError(f"--gguf {str(gguf)!r}: no such file; give the base model as a GGUF file, or leave it out")
    if gguf is not None:
        read_header(gguf)  # raises CELoraError if it is no GGUF file
    beside = folder if folder.name.strip(".") else folder.resolve()  # the folder may be ".", which has no name
    output = output or beside.with_name(f"{folder.resolve().name}{'-merged' if merged else ''}-{to}")
    alone = output.suffix.lower() == ".gguf"
    if alone and to != "gguf":
        raise CELoraError(
            f"--output {str(output)!r} is the name of a GGUF file; --to {to} writes a folder, so name one"
        )
    _check_output(output, overwrite=overwrite, alone=alone)
    request = request_of(folder, adapter_config(folder), model)
    gguf = gguf or gguf_of(str(request.given["model"]))
    if merged and to == "gguf" and gguf is None:
        raise CELoraError(
            "--merged --to gguf takes metadata and tokenizer from the base model's GGUF file; give --gguf FILE or, "
            "without one, --to safetensors, which llama.cpp's convert_hf_to_gguf.py reads"
        )
    if alone and gguf is not None and output.exists() and output.samefile(gguf):
        raise CELoraError(f"--output {str(output)!r} is the base model; give another name")
    adapter = SavedAdapter(folder)
    _check_layers(adapter, folder, request)
    name = folder.resolve().name
    if alone:
        with replacing(output) as new:
            tensors = _write_gguf(new, adapter, request, merged, gguf, outtype, name)
        return Export(output, [output.name], tensors, _command(output, request, merged, gguf))
    file = MODEL if merged else ADAPTER
    with replacing_folder(output) as new:
        if to == "safetensors":
            base = base_folder(request.model, request.lora["model_revision"])
            tensors = write_folder(new, base, adapter, tokenizer_of(folder, request))
        elif to == "mlx":
            tensors = write_mlx(new, adapter, _config(request))
        else:
            tensors = _write_gguf(new / file, adapter, request, merged, gguf, outtype, name)
        if to != "mlx":  # which Ollama cannot read
            (new / MODELFILE).write_text(_modelfile(request, to, merged, gguf), encoding="utf-8")
        note = {"celora": celora.__version__, "to": to, "merged": merged, "tensors": tensors}
        (new / MARK).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        files = sorted(path.name for path in new.iterdir())
    return Export(output, files, tensors, _command(output / file, request, merged, gguf) if to == "gguf" else None)


def _write_gguf(
    file: Path,
    adapter: SavedAdapter,
    request: TrainRequest,
    merged: bool,
    gguf: Path | None,
    outtype: str | None,
    name: str,
) -> int:
    if merged and gguf is not None:
        from celora.train.formats.merged_gguf import write_merged

        return write_merged(file, gguf, adapter, _config(request), outtype or "f16", name)
    from celora.train.formats.lora_gguf import write_lora

    return write_lora(file, adapter, _config(request), name, None if gguf is None else read_header(gguf))


def _command(file: Path, request: TrainRequest, merged: bool, gguf: Path | None) -> str:
    """What runs a GGUF file with llama.cpp."""
    if merged:
        return shlex.join(["llama-cli", "-m", str(file)])
    base = "BASE.gguf" if gguf is None else str(gguf)
    return shlex.join(["llama-cli", "-m", base, "--lora", str(file)])


def _check_layers(adapter: SavedAdapter, folder: Path, request: TrainRequest) -> None:
    """Raise CELoraError if the base model has layers that the adapter was not trained on, though PEFT would adapt them.

    What the base model lacks is an error of the format.
    """
    config = checked_config(request)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the adapter was trained
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            adapted = get_peft_model(model, copy.deepcopy(adapter.config))
        except ValueError:  # it is of another kind, or lacks what the adapter is on
            return
    check_layers(adapted, {f"{PREFIX}{layer}" for layer in adapter.layers}, folder)


def _check_output(output: Path, *, overwrite: bool, alone: bool) -> None:
    if not output.parent.is_dir():
        raise CELoraError(f"--output {str(output)!r}; expected a name in a folder that exists")
    if not output.exists() and not output.is_symlink():
        return
    if alone and not output.is_file():
        raise CELoraError(
            f"--output {str(output)!r} is a folder; a name that ends in .gguf is the file, choose another"
        )
    if not alone and (not (output / MARK).is_file() or output.is_symlink()):
        raise CELoraError(f"--output {str(output)!r} exists and no export made it, so it is left alone; choose another")
    if not overwrite:
        raise CELoraError(f"--output {str(output)!r} exists; --overwrite replaces it")


def _config(request: TrainRequest) -> Any:
    """The configuration of the base model's decoder."""
    return checked_config(request).get_text_config()


def _modelfile(request: TrainRequest, to: str, merged: bool, gguf: Path | None) -> str:
    """What `ollama create NAME -f Modelfile` reads."""
    head = "# ollama create NAME -f Modelfile\n"
    if merged:
        return f"{head}FROM {'.' if to == 'safetensors' else f'./{MODEL}'}\n"
    if gguf is None and not Path(request.model).is_dir():
        return (
            f"{head}# Put the base model here, {request.model}: a GGUF file, or a folder of safetensors.\n"
            f"FROM ./base.gguf\nADAPTER ./{ADAPTER}\n"
        )
    return f"{head}FROM {gguf.resolve() if gguf is not None else request.model}\nADAPTER ./{ADAPTER}\n"
