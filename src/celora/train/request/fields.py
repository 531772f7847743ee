"""The names that `celora train` accepts: celora's own options and every name that `trl sft` takes.

A field's type hint decides how a value is converted, from a flag and from YAML alike. So `--bf16 false` and
`bf16: false` mean the same, and fail with the same line. `DEFAULTS` differ from TRL's, each with a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import json
import math
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any

from celora.errors import CELoraError, unknown
from celora.files import pairs_once
from celora.settings.names import GONE
from celora.train.request.names import launcher_names, trl_names

# Defaults that differ from TRL's, and why. `device_defaults` adds machine-dependent ones.
DEFAULTS: dict[str, tuple[object, str]] = {
    "learning_rate": (2e-4, "TRL's 2e-5 suits full fine-tuning; LoRA wants about ten times that"),
    "gradient_checkpointing": (
        False,
        "it computes every forward twice, half as much work again; celora turns it on if a step would not fit",
    ),
    "logging_nan_inf_filter": (False, "a loss that is not a number should be seen, not replaced by the mean"),
    "logging_steps": (1, "a metrics row costs nothing beside a step, and the report wants the curve"),
    "eval_steps": (10, "as often as TRL, by its logging_steps; an evaluation takes time, a metrics row does not"),
    "save_steps": (100, "an adapter checkpoint is small; 500 steps of lost work are not"),
    "save_total_limit": (2, "the last two are enough to resume from"),
    "dtype": ("auto", "the checkpoint's own dtype, or float32 where that is clearly faster; TRL takes float32"),
    "lora_target_modules": (["all-linear"], "the published setting; PEFT's own choice is q_proj and v_proj only"),
    "lora_dropout": (0.0, "dropout on every adapter input costs about a tenth of a step"),
    "ddp_find_unused_parameters": (False, "every adapter gets a gradient; looking for one without takes time"),
    "assistant_only_loss": (None, "a chat model should learn to answer; TRL also trains it to write what users say"),
    "report_to": ("none", "nothing leaves the machine unless asked"),
    "hub_strategy": ("end", "--push_to_hub uploads the finished adapter, once"),
}
DEVICE_DEFAULTS = {
    "assistant_only_loss": "true for rows of messages, false in a file made for `trl sft`",
    "use_cpu": "true where torch finds no accelerator (CUDA, MPS, XPU ...)",
    "bf16": "true on a CUDA device that has it, false elsewhere",
    "dataloader_pin_memory": "true with CUDA only",
    "accelerator_config": "where batches are pinned, their copies do not wait (non_blocking)",
}
# TRL's name -> celora's name, so that a `trl sft` configuration works.
ALIASES = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "output"}
# Other tools' name -> celora's name, for the error message. A guess by spelling would suggest a wrong setting.
SYNONYMS = {
    other: name
    for name, others in {
        "model": "base_model model_id model_name model_path pretrained_model",
        "data": "data_path dataset dataset_dir dataset_path train_data train_dataset train_file",
        "eval_data": "eval_dataset eval_file test_data val_data valid_data validation_data validation_file",
        "output": "adapter_path out out_dir output_folder output_path save_dir",
        "resume": "resume_from resume_training",
        "overwrite": "force overwrite_output_dir",
        "learning_rate": "base_lr lr",
        "num_train_epochs": "epoch epochs max_epochs num_epochs",
        "max_steps": "iterations iters max_iters num_steps steps total_steps train_steps",
        "per_device_train_batch_size": "batch batch_size bs micro_batch_size train_batch_size",
        "per_device_eval_batch_size": "eval_batch_size val_batch_size",
        "gradient_accumulation_steps": "accumulation_steps accumulate_grad_batches grad_accum grad_accumulation_steps "
        "gradient_accumulation",
        "gradient_checkpointing": "checkpointing grad_checkpoint grad_checkpointing",
        "max_length": "block_size context_length cutoff_len max_len max_seq_len max_seq_length seq_len sequence_len "
        "sequence_length",
        "lora_r": "lora_rank r rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "lora_target_modules": "lora_target target_modules",
        "optim": "opt optimizer",
        "lr_scheduler_type": "lr_scheduler schedule scheduler",
        "warmup_steps": "num_warmup_steps warmup",
        "weight_decay": "wd",
        "max_grad_norm": "clip_grad_norm grad_clip gradient_clip_val",
        "logging_steps": "log_every log_interval steps_per_report",
        "save_steps": "save_every save_interval",
        "eval_steps": "eval_every eval_interval steps_per_eval",
        "load_in_4bit": "load_4bit use_4bit",
        "load_in_8bit": "load_8bit use_8bit",
    }.items()
    for other in others.split()
}
# Names that `trl sft` takes and celora cannot honour: the one value that is accepted, and what to do instead.
REFUSED: dict[str, tuple[object, str]] = {
    "use_peft": (True, "celora trains LoRA adapters only; use `trl sft` for full fine-tuning"),
    "trust_remote_code": (False, "celora never runs code that comes with a model"),
    "resume_from_checkpoint": (None, "give --resume to continue the run in --output"),
    "dataset_streaming": (False, "rows wait in a file on disk, so memory stays flat without it"),
    "streaming": (False, "rows wait in a file on disk, so memory stays flat without it"),
    "datasets": ([], "put the rows of all of them into one folder and give that as data"),
    "test_split_size": (None, "hold rows out in a file of their own and give it as eval_data"),
    "ignore_bias_buffers": (False, "it does nothing in `trl sft` either"),
    "bf16_full_eval": (False, "it would round the adapter that is saved afterwards"),
    "fp16_full_eval": (False, "it would round the adapter that is saved afterwards"),
}
# The smallest and the largest value of a number. Outside, TRL, transformers or torch would fail late, or silently do
# something else. The bounds themselves are allowed, unless the name is in OPEN_BELOW or OPEN_ABOVE.
RANGES: dict[str, tuple[float, float | None]] = {
    "learning_rate": (0, None),
    "num_train_epochs": (0, None),
    "max_steps": (-1, None),
    "max_length": (1, None),
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "logging_steps": (0, None),
    "save_steps": (0, None),
    "eval_steps": (0, None),
    "eval_accumulation_steps": (1, None),
    "save_total_limit": (0, None),
    "weight_decay": (0, None),
    "max_grad_norm": (0, None),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, None),
    "warmup_steps": (0, None),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, None),
    "dataloader_num_workers": (0, None),
    "dataloader_prefetch_factor": (1, None),
    "pad_to_multiple_of": (1, None),
    "seed": (0, 2**32 - 1),
    "lora_r": (1, None),
    "lora_alpha": (1, None),
    "lora_dropout": (0, 1),
}
OPEN_BELOW = frozenset({"num_train_epochs"})
OPEN_ABOVE = frozenset({"adam_beta1", "adam_beta2", "label_smoothing_factor", "lora_dropout"})
ADVICE = {
    "learning_rate": "LoRA usually wants about 2e-4",
    "max_length": "--max_length none keeps every token",
    "max_steps": "-1 trains num_train_epochs",
    "save_total_limit": "0 keeps every checkpoint",
}
_MOST = 2**63 - 1  # the largest integer in torch


@dataclass(frozen=True)
class RunOptions:
    """celora's own options; everything else belongs to TRL."""

    model: str | None = field(default=None, metadata={"help": "Hugging Face name, local folder or .gguf file"})
    data: str | None = field(
        default=None, metadata={"help": ".jsonl, .json, .csv or .parquet file, folder, or hub name"}
    )
    output: str | None = field(default=None, metadata={"help": "folder for adapter, checkpoints, metrics and report"})
    preset: str | None = field(default=None, metadata={"help": "auto (the default), fast, exact, paper or off"})
    config: str | None = field(default=None, metadata={"help": "YAML file holding any of these names"})
    eval_data: str | None = field(default=None, metadata={"help": "rows to evaluate at the end and by eval_strategy"})
    dataset_train_split: str = field(default="train", metadata={"help": "split of the data to train on"})
    dataset_test_split: str = field(
        default="test", metadata={"help": "split to evaluate on, of eval_data or, with an eval_strategy, of data"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a hub data set"})
    bias: str = field(
        default="none", metadata={"help": "PEFT: biases that train", "choices": ["none", "all", "lora_only"]}
    )
    lora_bias: bool = field(default=False, metadata={"help": "PEFT: a bias on lora_B"})
    resume: bool = field(default=False, metadata={"help": "continue from the last complete checkpoint"})
    overwrite: bool = field(default=False, metadata={"help": "replace the run that is in the output folder"})
    quiet: bool = field(default=False, metadata={"help": "print warnings and errors only"})
    base: str | None = field(default=None, metadata={"help": "int8: store the base in 8 bits", "choices": ["int8"]})
    memory: str | None = field(default=None, metadata={"help": "8GiB: the fastest settings that are estimated to fit"})
    celora: dict[str, Any] | None = field(default=None, metadata={"help": "CELoraConfig fields (YAML mapping or JSON)"})


@dataclass(frozen=True)
class Field:
    """One accepted name: whose option it is, its type, its default and its help."""

    owner: str
    name: str
    hint: Any
    default: object
    help: str
    choices: tuple[str, ...]


@functools.cache
def known_fields() -> dict[str, Field]:
    """Every accepted name. Imports TRL, which takes seconds, so nothing here runs at import."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    found: dict[str, Field] = {}
    owners = [("script", ScriptArguments), ("script", DatasetMixtureConfig)]
    for owner, cls in (*owners, ("train", SFTConfig), ("lora", ModelConfig), ("run", RunOptions)):
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            text = " ".join(str(f.metadata.get("help", "")).replace("%%", "%").split())
            choices = tuple(f.metadata.get("choices", ()))
            # transformers' own parser reads JSON from text; here a mapping is enough.
            hint = dict[str, Any] | None if f.name.endswith("_kwargs") else hints[f.name]
            if f.name not in ALIASES:
                found[f.name] = Field(owner, f.name, hint, default, text, choices)
    return found


def convert(f: Field, value: object) -> Any:
    """Convert `value` (a string, several strings, or a value from YAML) to the field's type. Else a one-line error."""
    kinds = alternatives(f.hint)
    origins = {typing.get_origin(kind) or kind for kind in kinds}
    words = [m.value for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum) for m in kind]
    text = value.strip() if isinstance(value, str) else ""
    result: Any = None
    if value is None or (text.lower() in ("none", "null") and str not in origins):
        if NoneType in origins:
            return None
    elif isinstance(value, list):
        result = [str(item) for item in value] if list in origins else None
    elif isinstance(value, dict) or text.startswith("{"):
        result = _mapping(f, value) if dict in origins else None
    elif bool in origins and (flag := _boolean(value)) is not None:
        result = flag
    elif isinstance(value, bool):
        # YAML 1.1 reads a bare `no` or `off` as false: `eval_strategy: no`, `preset: off`.
        result = None if value else "off" if f.name == "preset" else "no" if "no" in words else None
    elif (number := _number(value, origins)) is not None:
        result = number
    elif words and value not in words:
        raise unknown(f.name, value, map(str, words))
    elif str in origins:
        result = str(value)
    elif list in origins:
        result = [str(value)]
    if result is None:
        raise CELoraError(f"{f.name}={value!r}; expected {describe_type(f.hint)}")
    if f.choices and result not in f.choices:
        raise unknown(f.name, result, f.choices)
    if isinstance(result, int | float) and not isinstance(result, bool):
        _check_range(f.name, result)
    return result


def _check_range(name: str, value: int | float) -> None:
    least, most = RANGES.get(name, (None, None))
    low = least is not None and (value <= least if name in OPEN_BELOW else value < least)
    high = most is not None and (value >= most if name in OPEN_ABOVE else value > most)
    expected = ""
    if isinstance(value, int) and abs(value) > _MOST:  # first: math fails on larger ones
        expected = "a number of 64 bits"
    elif math.isnan(value) or (math.isinf(value) and name != "max_grad_norm"):  # whose infinity means: never clip
        expected = "a finite number"
    elif low or high:
        expected = f"a number {'>' if name in OPEN_BELOW else '>='} {least:g}"
        expected += "" if most is None else f" and {'<' if name in OPEN_ABOVE else '<='} {most:.10g}"
    if expected:
        shown = str(value) if len(str(value)) <= 30 else f"{str(value)[:27]}..."
        raise CELoraError(f"{name}={shown}; expected {expected}. {ADVICE.get(name, '')}".rstrip(" ."))


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _boolean(value: object) -> bool | None:
    words = {"true": True, "yes": True, "t": True, "y": True, "1": True}
    words |= {"false": False, "no": False, "f": False, "n": False, "0": False}
    return words.get(str(value).lower())


def _number(value: object, origins: set[Any]) -> int | float | None:
    # Convert the text: YAML 1.1 reads 2e-4 as a string, and int(10.5) would be 10. A float field keeps 3 as 3.
    for kind in (int, float):
        if kind in origins or float in origins:
            with contextlib.suppress(ValueError):
                return kind(str(value))
    return None


def _mapping(f: Field, value: object) -> object:
    try:
        return json.loads(value, object_pairs_hook=pairs_once) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise CELoraError(f"{f.name}={value!r}; expected a JSON object ({error})") from None


def describe_type(hint: Any) -> str:
    """A type in words: `a whole number or none`."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "none"}
    words = []
    for kind in alternatives(hint):
        base = typing.get_origin(kind) or kind
        if base in names:
            words.append(names[base])
        elif base is list:
            words.append("one or more words")
        elif base is dict:
            words.append("a mapping (JSON on the command line)")
        elif isinstance(base, type) and issubclass(base, enum.Enum):
            words.append("one of " + ", ".join(str(m.value) for m in base))
    return " or ".join(words) or "a value that only Python code can give"


def read_flags(tokens: Sequence[str]) -> dict[str, object]:
    """A raw mapping from `--name value`, `--name=value`, `--name v1 v2`, `--name` and `--no_name`. The last wins."""
    known, flags = known_fields(), dict[str, object]()
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise CELoraError(f"unexpected argument {token!r}; options look like --max_steps 40")
        raw, has_value, inline = token[2:].partition("=")
        written = raw.replace("-", "_")
        positive = known.get(written.removeprefix("no_"))
        negated = (
            written not in known and written.startswith("no_") and positive and bool in alternatives(positive.hint)
        )
        name = positive.name if positive and negated else known_name(written, f"option --{raw}")
        values = [inline] if has_value else []
        while rest and not has_value and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if negated and values:
            raise CELoraError(f"--{raw} takes no value; write --{name} {' '.join(values)}, or --{raw} alone")
        if not values and bool not in alternatives(known[name].hint):
            raise CELoraError(f"--{name} needs a value: {describe_type(known[name].hint)}")
        flags[name] = not negated if not values else values[0] if len(values) == 1 else values
    return flags


def known_name(name: str, label: str) -> str:
    """celora's own name for `name`, which may be an alias. An error for an unknown name suggests the nearest."""
    return _known(name, label, known_fields().keys())


def check_flags(tokens: Sequence[str]) -> None:
    """Raise CELoraError at once for a flag that TRL's sources do not know. Importing TRL first would take seconds.

    `read_flags` checks again with the imported classes.
    """
    of_trl = trl_names()
    if of_trl is None:
        return
    known = of_trl | {f.name for f in dataclasses.fields(RunOptions)}
    for token in tokens:
        raw = token[2:].partition("=")[0]
        written = raw.replace("-", "_")
        if token.startswith("--") and raw and written.removeprefix("no_") not in known:
            _known(written, f"option --{raw}", known)


def _known(name: str, label: str, known: Collection[str]) -> str:
    name = ALIASES.get(name, name)
    if name in known:
        return name
    if name in GONE:
        raise CELoraError(f"{label} is gone: {GONE[name]}")
    if name in launcher_names():
        raise CELoraError(f"{label} belongs to the launcher: accelerate launch --{name} ... -m celora train ...")
    nearest = SYNONYMS.get(name.lower()) or next(iter(difflib.get_close_matches(name, [*known, *ALIASES], n=1)), None)
    shown = f"--{nearest}" if label.startswith("option ") else repr(nearest)
    near = f"; did you mean {shown}?" if nearest else "."
    raise CELoraError(f"unknown {label}{near} `celora train --help-all` lists every name.")


def help_all() -> str:
    """Every accepted name with its type, default and purpose, as plain text."""
    titles = {"run": "celora", "lora": "model and LoRA (TRL ModelConfig)", "train": "training (TRL SFTConfig)"}
    lines = ["Every name works as a flag (--max_steps 40, --max-steps 40) and as a key in the --config file."]
    for owner, title in titles.items():
        lines += ["", f"{title}:"]
        for f in known_fields().values():
            if f.owner != owner or f.name in REFUSED:
                continue
            default, why = DEFAULTS.get(f.name, (f.default, ""))
            note = f" (differs from TRL's {f.default!r}: {why})" if why and default != f.default else ""
            shown = DEVICE_DEFAULTS.get(f.name, repr(default))
            lines.append(f"  --{f.name}  {describe_type(f.hint)}; default {shown}{note}. {f.help}".rstrip())
    lines += ["", "names of `trl sft` that are refused, unless they switch something off:"]
    lines += [f"  --{name}  {instead}." for name, (_, instead) in REFUSED.items()]
    return "\n".join(lines)
