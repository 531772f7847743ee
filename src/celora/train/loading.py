"""Load model, tokenizer and rows of a run, and make its adapter's configuration. A failure is told in one line."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError  # the exception; nothing here is unpickled
from typing import Any

import datasets
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from trl import ModelConfig, get_quantization_config

from celora.errors import CELoraError, unknown
from celora.files import read_json
from celora.train.int8_loading import complete, load_int8_model
from celora.train.processes import is_first
from celora.train.request.arguments import TrainRequest
from celora.train.rows.data import load_rows
from celora.train.rows.places import local_files
from celora.weights.read import shape_of


def check_files(request: TrainRequest) -> None:
    """Report a mistake in the names of the user's files before anything large is loaded or converted."""
    options = request.options
    local_files(request.data, options.dataset_train_split)
    if options.eval_data is not None:
        local_files(options.eval_data, options.dataset_test_split)


def with_folder(request: TrainRequest, say: Callable[[str], None] | None = None) -> TrainRequest:
    """The request. If its model is a GGUF file, a folder of Transformers takes the place of the file.

    `request.given` keeps the file, which is what the user knows and what the record of a run names. `say` is told of a
    conversion before it begins.

    Raises:
        CELoraError: the file cannot be converted, or it cannot be known which of several is meant.
    """
    path = gguf_of(request.model)
    if path is None:
        return request
    from celora.train.formats.gguf_base import converted  # most models need no `gguf`

    return replace(request, model=str(converted(path, request.lora["dtype"], say)))


def gguf_of(model: str) -> Path | None:
    """The GGUF file that a model's name means: itself, or the only one in a folder without a model of Transformers."""
    path = Path(model).expanduser()
    if path.is_file():
        with contextlib.suppress(OSError), path.open("rb") as file:
            return path if path.suffix == ".gguf" or file.read(4) == b"GGUF" else None
    if not path.is_dir() or any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        return None
    found = sorted(file.name for file in path.glob("*.gguf"))
    if len(found) > 1:
        raise CELoraError(f"--model {model!r} holds {len(found)} GGUF files; give one of them: {', '.join(found[:5])}")
    return path / found[0] if found else None


_OF_TOKENIZERS = ("*token*", "vocab*", "merges.txt", "*.model", "*.bpe")


def load_tokenizer(request: TrainRequest) -> Any:
    """The tokenizer of the model."""
    check_model_folder(request.model)
    return read_tokenizer(request.model, revision=request.lora["model_revision"])


def read_tokenizer(source: str, *, revision: str = "main") -> Any:
    """The tokenizer in a folder, or of a model on the hub. An empty chat template is none: it would render nothing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise about a file that is not what it should be
        raise CELoraError(f"cannot load a tokenizer from {source!r}: {_first_line(error)}") from error
    if isinstance(tokenizer.chat_template, str) and not tokenizer.chat_template.strip():
        tokenizer.chat_template = None
    return tokenizer


def training_rows(request: TrainRequest, tokenizer: Any) -> datasets.Dataset:
    """The rows to train on; see `load_rows`."""
    return _rows(request, tokenizer, request.data, request.options.dataset_train_split)


def evaluation_source(request: TrainRequest) -> str | None:
    """`eval_data`. Without it, the data, if a setting needs its test split, as with `trl sft`; else None."""
    return request.options.eval_data or (request.data if _asking_for_rows(request) else None)


def _asking_for_rows(request: TrainRequest) -> list[str]:
    """The settings that need rows to evaluate on."""
    nothing = {"eval_strategy": "no", "eval_on_start": False}
    return [f"{name}={request.train[name]!r}" for name, no in nothing.items() if request.train.get(name, no) != no]


def evaluation_rows(request: TrainRequest, tokenizer: Any) -> datasets.Dataset | None:
    """The rows to evaluate on, if there are any; see `load_rows`."""
    options, source = request.options, evaluation_source(request)
    if source is None:
        return None
    if options.eval_data is None and Path(source).expanduser().is_file():
        asking = _asking_for_rows(request)[0]
        raise CELoraError(f"{asking} needs rows to evaluate on, and data is one file; give --eval-data")
    return _rows(request, tokenizer, source, options.dataset_test_split)


def _rows(request: TrainRequest, tokenizer: Any, source: str, split: str) -> datasets.Dataset:
    chat = bool(tokenizer.chat_template or request.train.get("chat_template_path"))
    config = request.options.dataset_config if source == request.data else None
    text_field = request.train.get("dataset_text_field")
    answers = request.train.get("assistant_only_loss")
    return load_rows(source, split=split, chat=chat, config=config, text_field=text_field, answers=answers is not False)


def load_model(request: TrainRequest) -> Any:
    """The base model in the dtype settled for it, on the CPU unless quantised; the Trainer moves it."""
    lora = request.lora
    try:
        if request.options.base is not None:
            return load_int8_model(
                request.model,
                revision=lora["model_revision"],
                dtype=lora["dtype"],
                attention=lora["attn_implementation"],
                settings=request.train.get("model_init_kwargs") or {},
            )
        settings = {k: v for k, v in lora.items() if "quant" in k or "load_in" in k}
        quantization = get_quantization_config(ModelConfig(dtype=_compute_dtype(request), **settings))
        extra = {} if quantization is None else {"quantization_config": quantization}
        found = AutoModelForCausalLM.from_pretrained(
            request.model,
            revision=lora["model_revision"],
            dtype=lora["dtype"],
            attn_implementation=lora["attn_implementation"],
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
            **(request.train.get("model_init_kwargs") or {}),
        )
        return complete(*found)
    except Exception as error:  # whatever transformers raises about a file, or about a value of model_init_kwargs
        raise CELoraError(f"cannot load a model from {request.model!r}: {_first_line(error)}") from error


def _compute_dtype(request: TrainRequest) -> Any:
    """The dtype that 4-bit layers compute in: --dtype or, if that is auto, the checkpoint's; None means float32."""
    dtype = request.lora["dtype"]
    if dtype != "auto" or not request.lora["load_in_4bit"]:
        return dtype
    return read_config(request).dtype


def read_config(request: TrainRequest) -> Any:
    """The configuration of the model. Raises whatever Transformers raises about a damaged file, or one that lacks."""
    return AutoConfig.from_pretrained(request.model, revision=request.lora["model_revision"], trust_remote_code=False)


def checked_config(request: TrainRequest) -> Any:
    """`read_config`, but a file that is damaged or missing becomes a one-line error."""
    try:
        return read_config(request)
    except Exception as error:  # whatever transformers raises about a file
        raise CELoraError(f"cannot load a model from {request.model!r}: {_first_line(error)}") from error


def check_model_folder(model: str) -> None:
    """Say plainly what is wrong with a local folder, before the loaders say it in twenty lines."""
    path = Path(model).expanduser()
    if not path.exists():
        if path.suffix == ".gguf":  # never the name of a model on the hub, which would be asked for it
            raise CELoraError(f"--model {model!r}: no such file; check the name")
        if model.startswith((".", "/", "~")) or "\\" in model or ":" in model or model.count("/") > 1:
            raise CELoraError(f"--model {model!r}: no such folder")
        return
    if not path.is_dir():
        raise CELoraError(f"--model {model!r} is a file; expected a folder, a GGUF file or a Hugging Face name")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        adapter = read_json(path / "adapter_config.json")
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        raise CELoraError(f"--model {model!r} is an adapter, not a model; give its base model {base!r}")
    if not (path / "config.json").exists():
        raise CELoraError(f"--model {model!r} is not a model folder: it has no config.json")
    if not any(path.glob("*.safetensors")):
        if pickled := next(path.glob("*.bin"), None):
            raise CELoraError(
                f"--model {model!r} holds {pickled.name}, a pickle, and no .safetensors: pickles are never unpickled "
                "here. If you trust it, convert it once, model and tokenizer: "
                f"AutoModelForCausalLM.from_pretrained({model!r}).save_pretrained(FOLDER), and give --model FOLDER"
            )
        raise CELoraError(f"--model {model!r} has no weights: no .safetensors file in it")
    if not any(any(path.glob(pattern)) for pattern in _OF_TOKENIZERS):
        raise CELoraError(f"--model {model!r} has no tokenizer: no tokenizer.json or the like in it; copy it there")


def load_adapter(model: Any, adapter: Path) -> Any:
    """The model with the adapter in a folder, ready to train."""
    if not (adapter / "adapter_config.json").exists():
        raise CELoraError(f"--adapter {str(adapter)!r} holds no adapter: it has no adapter_config.json")
    if not (adapter / "adapter_model.safetensors").exists():
        raise CELoraError(
            f"--adapter {str(adapter)!r} has no adapter_model.safetensors; an adapter_model.bin, a pickle, is not read"
        )
    try:
        loaded = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            saved = layers(file.keys())
    except Exception as error:
        raise CELoraError(f"cannot load the adapter in {str(adapter)!r}: {_first_line(error)}") from error
    check_layers(loaded, saved, adapter)
    return loaded


def check_layers(model: Any, saved: set[str], adapter: Path) -> None:
    """Raise CELoraError if the model has fewer or more layers under the adapter than are saved in its folder.

    PEFT would pass over the layers that the model lacks, and give the others an adapter that has learnt nothing.
    """
    there = layers(get_peft_model_state_dict(model, save_embedding_layers=False))
    own = "Give the model that the adapter was trained on"
    if there < saved:
        raise CELoraError(
            f"the adapter in {str(adapter)!r} has weights for {len(saved)} layers, and the model has {len(there)} of "
            f"them; {min(saved - there)!r} is one that it lacks. {own}"
        )
    if saved < there:
        raise CELoraError(
            f"the adapter in {str(adapter)!r} has weights for {len(saved)} layers, and the model has {len(there)} for "
            f"it; {min(there - saved)!r} is one that it has no weights for. {own}"
        )


def layers(names: Iterable[str]) -> set[str]:
    """The layers that these LoRA weights belong to."""
    return {name.rpartition(".lora_")[0] for name in names if ".lora_" in name}


def check_modules(request: TrainRequest, model: Any) -> None:
    """Raise CELoraError for a module or parameter to train that the model lacks: of several, PEFT passes over it."""
    names = [name for name, _ in model.named_modules()]
    for target in request.lora["lora_modules_to_save"] or ():
        if not any(name.endswith(target) for name in names):
            raise CELoraError(
                f"lora_modules_to_save={target!r}, but the model has no module of that name; leave it out"
            )
    if any(parameter.dim() > 2 for parameter in model.parameters()):
        return  # a layer's experts are one parameter, for which PEFT translates the names that they had before
    for target in request.lora["lora_target_parameters"] or ():
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_parameters()):
            raise CELoraError(
                f"lora_target_parameters={target!r}, but the model has no parameter of that name; leave it out"
            )
    targets = request.lora["lora_target_modules"] or []
    for target in [] if _is_expression(targets) else targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            linear = {name.rpartition(".")[2] for name, module in model.named_modules() if all(shape_of(module))}
            raise unknown("lora_target_modules", target, linear | {"all-linear"})


def _is_expression(targets: list[str]) -> bool:
    """Whether PEFT takes the targets as a text: "all-linear", or an expression for the whole name of a layer."""
    return len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0])


def lora_config(request: TrainRequest) -> LoraConfig:
    """PEFT's configuration of the adapter, with the rank that trains."""
    from celora.train.trainer import refused  # here: whoever only loads an adapter needs no trainer

    lora = request.lora
    if lora["lora_task_type"] not in TaskType.__members__:
        raise unknown("lora_task_type", lora["lora_task_type"], TaskType.__members__)
    extra = {} if lora["lora_target_parameters"] is None else {"target_parameters": lora["lora_target_parameters"]}
    targets = lora["lora_target_modules"]
    if "all-linear" in (targets or []) and len(targets) > 1:
        raise CELoraError(f"lora_target_modules={targets}: all-linear takes every linear layer; give it alone")
    with refused("adapter"):
        return LoraConfig(
            task_type=lora["lora_task_type"],
            r=request.r,
            target_modules=targets[0] if targets and _is_expression(targets) else targets,
            lora_alpha=lora["lora_alpha"],
            lora_dropout=lora["lora_dropout"],
            bias=request.options.bias,
            lora_bias=request.options.lora_bias,
            use_rslora=lora["use_rslora"],
            use_dora=lora["use_dora"],
            modules_to_save=lora["lora_modules_to_save"],
            **extra,
        )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' progress bars and the notices that say nothing is wrong.

    No questions either: if a library loads something that comes with code, transformers refuses it instead of asking
    whether to run it. With several processes, only the first one warns.
    """
    verbosity = transformers.logging.get_verbosity()
    if not is_first():
        transformers.logging.set_verbosity_error()
    datasets_bars, transformers_bars = (
        datasets.is_progress_bar_enabled(),
        transformers.logging.is_progress_bar_enabled(),
    )
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    patience, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    # Trainer aligns pad/bos/eos of model and tokenizer and says so at warning level on every run.
    # It says of a resumed run what is then put right: other steps, and the best checkpoint of a folder that was moved.
    notice = _without(
        "The tokenizer has new PAD/BOS/EOS tokens", "do not match the ones in the `trainer_state", "The best checkpoint"
    )
    logger = logging.getLogger("transformers.trainer")
    handlers = [*logging.getLogger("transformers").handlers]
    for handler in handlers:
        handler.addFilter(notice)
    logger.addFilter(notice)
    try:
        with warnings.catch_warnings():
            # PEFT looks for the base model's configuration on the hub when it saves; offline it says that it could not.
            warnings.filterwarnings("ignore", message="Could not find a config file in", module="peft")
            # PEFT asks transformers for an attribute that transformers has renamed.
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            # PEFT sets for GPT-2's layers what nobody can give to `celora train`.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D")
            # PEFT takes the one-dimensional bias of lora_bias=True for a matrix that lost a dimension.
            warnings.filterwarnings("ignore", message=r".*have invalid shape: \S+\.lora_B\.bias")
            if not is_first():
                warnings.simplefilter("ignore")
            yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience
        if not is_first():
            transformers.logging.set_verbosity(verbosity)
        logger.removeFilter(notice)
        for handler in handlers:
            handler.removeFilter(notice)
        if datasets_bars:
            datasets.enable_progress_bars()
        if transformers_bars:
            transformers.logging.enable_progress_bar()


def _without(*texts: str) -> Any:
    return lambda record: not any(text in record.getMessage() for text in texts)


def _first_line(error: BaseException) -> str:
    if isinstance(error, UnpicklingError):
        return "its weights come with objects other than tensors, which are never unpickled"
    if "ignore_mismatched_sizes" in str(error):  # an option of Transformers, which it says was set
        return "weights in its files have other shapes than its config.json says; fetch both again"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
