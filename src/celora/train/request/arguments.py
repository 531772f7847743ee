"""The arguments of a run: one flat mapping of names to raw values, checked and completed into one `TrainRequest`.

The mapping comes from an earlier run (with --resume), a YAML file and flags. Flags win over the file, and the file over
the earlier run. From Python: `make_request({"model": ..., "data": ..., "output": ..., "max_steps": 40})`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celora.errors import CELoraError, unknown
from celora.files import check_name, finite, is_stream
from celora.settings.config import CELoraConfig, balanced_rank
from celora.settings.presets import PRESETS, resolve
from celora.train.output.folder import RUN, OutputFolder
from celora.train.processes import processes
from celora.train.request.fields import (
    ALIASES,
    DEFAULTS,
    REFUSED,
    RunOptions,
    convert,
    known_fields,
    known_name,
    read_flags,
)
from celora.train.request.model_init import with_own_names
from celora.train.request.yaml_file import read_document

DEFAULT_PRESET = "auto"
# Presets whose adapter and frozen factor fit into LoRA's memory together: r = r0 = floor(7/8 lora_r), as published.
BALANCED = frozenset({"paper"})
# Arguments that --resume may change. Any other would make the rest a different run.
RESUMABLE = ("max_steps", "num_train_epochs", "quiet", "report_to", "run_name", "log_level", "disable_tqdm")
RESUMABLE_PREFIXES = ("logging_", "save_", "eval_", "per_device_eval_", "dataloader_num_", "dataloader_pin_", "hub_")
PATHS = ("model", "data", "eval_data", "output", "chat_template_path", "deepspeed")
SECRETS = frozenset({"hub_token", "push_to_hub_token"})  # never written into a folder


def read_yaml(path: str | Path) -> dict[str, object]:
    """Read a YAML file as a raw mapping. A saved celora_config.json is accepted, too: it becomes the `celora:` part."""
    document = read_document(path)
    fields = {f.name for f in dataclasses.fields(CELoraConfig)}
    if {"estimator", "keep_ratio"} & set(document) and set(document) <= fields:
        return {"celora": document}
    if str(document.get("num_processes")) == os.environ.get("WORLD_SIZE", "1"):
        del document["num_processes"]  # `trl sft` passes this to its launcher, which has started that many
    if document.get("config") is not None:
        raise CELoraError(f"key 'config' in {path}: a file names no other file; put all settings into one")
    found: dict[str, object] = {}
    for key, value in document.items():
        name = known_name(str(key).replace("-", "_"), f"key {str(key)!r} in {path}")
        if name in found:
            raise CELoraError(f"key {str(key)!r} in {path} says {name} a second time; keep one")
        found[name] = value
    if _is_trls(document):
        found.setdefault("assistant_only_loss", False)  # TRL's default; celora's own depends on the rows
    return found


def _is_trls(document: Mapping[str, object]) -> bool:
    """Whether a file was made for `trl sft`: it has a name that only TRL uses, and none that only celora knows."""
    names = {str(key).replace("-", "_") for key in document}
    ours = {f.name for f in dataclasses.fields(RunOptions) if not f.name.startswith("dataset_")}
    return not names.isdisjoint({*ALIASES, "use_peft"}) and names.isdisjoint(ours)


_NO_ESTIMATE = ("off", "exact")


def estimator_config(preset: str | None, mapping: Mapping[str, object] | None, lora_r: int) -> tuple[CELoraConfig, int]:
    """The CELoraConfig and the rank that trains, from a preset, CELoraConfig fields, or both. Fields win."""
    if preset is not None and preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    if preset is None and mapping:
        return CELoraConfig.from_dict(dict(mapping)), lora_r
    preset = preset or DEFAULT_PRESET
    config, r = resolve(preset), lora_r
    changes: dict[str, Any] = dict(mapping or {})
    settled = bool(config.overrides) or preset in ("auto", *_NO_ESTIMATE)
    shadowed = sorted({"estimator", "keep_ratio"} & changes.keys()) if settled else []
    if shadowed:
        raise CELoraError(
            f"celora: {shadowed[0]} has no effect beside preset {preset!r}, which sets it layer by layer; "
            "give overrides, or leave out the preset"
        )
    if preset in BALANCED and "rank" not in changes:
        r = balanced_rank(lora_r)
        changes["rank"] = "adapter"
    if isinstance(changes.get("overrides"), Mapping):
        changes["overrides"] = {**config.overrides, **changes["overrides"]}  # later entries win
    config = CELoraConfig.from_dict({**config.to_dict(), **changes})
    if preset in _NO_ESTIMATE and any(own.get("estimator", "dense") != "dense" for own in config.overrides.values()):
        raise CELoraError(f"celora: overrides with estimates beside preset {preset!r}, which has none; leave out one")
    return config, r


@dataclass(frozen=True)
class TrainRequest:
    """Everything that one training run needs.

    `given` has what the user asked for. `train` and `lora` have every setting, with defaults filled in.
    """

    model: str
    data: str
    output: Path
    preset: str | None
    config: CELoraConfig
    r: int
    options: RunOptions
    train: dict[str, Any]
    lora: dict[str, Any]
    given: dict[str, Any]

    @property
    def asks_for_checkpointing(self) -> bool:
        """Whether the user has settled gradient checkpointing, under either of Transformers' names for it."""
        return not {"gradient_checkpointing", "activation_checkpointing"}.isdisjoint(self.given)

    @property
    def lora_r(self) -> int:
        """The rank that the user asked for; `r` is the one that trains."""
        return int(self.lora["lora_r"])


def make_request(raw: Mapping[str, object]) -> TrainRequest:
    """Check and complete a raw mapping (flags, YAML, or a dict from Python)."""
    known = known_fields()
    names = {name: known_name(name, f"name {name!r}") for name in raw}
    values: dict[str, Any] = {names[name]: convert(known[names[name]], value) for name, value in raw.items()}
    values = with_own_names(values)
    for name, (nothing, instead) in REFUSED.items():
        if values.get(name, nothing) != nothing:
            raise CELoraError(f"{name}={values[name]!r} is refused: {instead}")
    needed = {"model": "MODEL", "data": "DATA", "output": "DIR"}
    if missing := [f"--{name}" for name in needed if not values.get(name)]:
        what = " ".join(f"--{name} {value}" for name, value in needed.items() if not values.get(name))
        raise CELoraError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; give {what}")
    if "/" in str(values.get("attn_implementation")):
        raise CELoraError(
            f"attn_implementation={values['attn_implementation']!r} is refused: it names code on the hub, which celora "
            "never runs; install flash-attn and give flash_attention_2, or give sdpa"
        )
    if values.get("push_to_hub") and values.get("hub_strategy", "end") != "end":
        raise CELoraError(
            f"hub_strategy={str(values['hub_strategy'])!r} is refused: checkpoints stay here, and push_to_hub uploads "
            "the finished adapter; leave it out"
        )
    if values.get("max_steps") == 0:
        raise CELoraError("max_steps=0 trains nothing; give 1 or more, or -1 to train num_train_epochs")
    if (values.get("dataset_kwargs") or {}).get("skip_prepare_dataset"):
        raise CELoraError(
            "skip_prepare_dataset in dataset_kwargs is refused: the rows are text, which has to be tokenised"
        )
    if values.get("resume") and values.get("overwrite"):
        raise CELoraError("--resume and --overwrite exclude each other")

    output = Path(values["output"])  # as it was given, for messages
    values = {name: _absolute(name, value) for name, value in values.items()}
    given: dict[str, Any] = {k: v for k, v in values.items() if k not in ("resume", "overwrite", "config")}
    defaults = {name: value for name, (value, _) in DEFAULTS.items()} | device_defaults(values)
    merged = {name: f.default for name, f in known.items() if f.owner == "lora"} | defaults | values
    options = RunOptions(**{f.name: values[f.name] for f in dataclasses.fields(RunOptions) if f.name in values})
    lora: dict[str, Any] = {name: merged[name] for name, f in known.items() if f.owner == "lora"}
    train = {name: value for name, value in merged.items() if known[name].owner == "train"}
    if "eval_steps" not in values and "logging_steps" in values:
        train["eval_steps"] = values["logging_steps"]  # Trainer's own default
    elif "eval_steps" not in values and values.get("load_best_model_at_end"):
        train["eval_steps"] = train["save_steps"]  # every saved adapter needs an evaluation
    config, r = estimator_config(options.preset, options.celora, lora["lora_r"])
    preset = options.preset or (None if options.celora else DEFAULT_PRESET)
    if options.base is not None:
        _check_base(options.base, lora | train)
    return TrainRequest(
        given["model"], given["data"], output.expanduser(), preset, config, r, options, train, lora, given
    )


def _check_base(base: str, settings: Mapping[str, Any]) -> None:
    """Raise CELoraError for settings that a base in 8 bits cannot have."""
    together = "several processes train it with DDP, each with all of it"
    for name, instead in {
        "load_in_4bit": "it is another way to store the base",
        "load_in_8bit": "it is another way to store the base",
        "fsdp": f"accelerate splits it while it moves it, and its bytes are laid out for the CPU; {together}",
        "deepspeed": f"ZeRO cannot split such a base; {together}",
    }.items():
        if settings.get(name):
            raise CELoraError(f"{name}={settings[name]!r} beside base={base!r}: {instead}; leave out one")


def raw_arguments(tokens: Sequence[str], own: Mapping[str, object] | None = None) -> dict[str, object]:
    """Flags, and the options in `own` that are already parsed, over the values in the --config file."""
    flags = {name: value for name, value in (own or {}).items() if value is not None and value is not False}
    flags |= read_flags(tokens)
    if isinstance(named := flags.get("config"), list):
        raise CELoraError(f"--config takes one file, got {len(named)}")
    document = read_yaml(str(named)) if named else {}
    if isinstance(preset := flags.get("preset"), str):
        document = fitting(document, preset)
    return document | flags


def fitting(settings: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """The settings without celora's own if the preset is off."""
    return {name: value for name, value in settings.items() if preset != "off" or name != "celora"}


def parse(tokens: Sequence[str], own: Mapping[str, object] | None = None) -> TrainRequest:
    """Turn arguments into a request. --resume adds the arguments of the run that is resumed.

    If there is no run to resume, --resume with --model and --data starts one: a queue or a supervisor can then repeat
    the same command line.
    """
    raw = raw_arguments(tokens, own)
    if not raw.get("resume"):
        return make_request(raw)
    if not raw.get("output"):
        raise CELoraError("--resume continues the run in --output; give --output DIR")
    folder = OutputFolder(Path(str(_absolute("output", str(raw["output"])))))
    if raw.get("model") and raw.get("data") and folder.earlier() is None:
        return make_request(raw)
    before = folder.resumable()
    check_record(folder.path / RUN, before)
    request = make_request(before["given"] | raw)
    # What --memory replaced is asked for again, by a command or a file that is repeated.
    again = {name for name, value in before.get("asked", {}).items() if request.given.get(name) == value}
    if again:
        raw = {name: value for name, value in raw.items() if known_name(name, f"name {name!r}") not in again}
        request = make_request(before["given"] | raw)
    _check_same_run(before, request)
    return request


def recorded(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` as run.json records it, without secrets. `make_request` makes the same request from it.

    Whether a command is quiet is for that command to say.
    A value that JSON cannot express (`max_grad_norm` may be infinite) becomes text, which `convert` reads back.
    """
    return {
        name: value if finite(value) == value else json.dumps(value, default=str)
        for name, value in given.items()
        if name not in SECRETS and name != "quiet"
    }


def check_record(path: Path, record: Mapping[str, Any]) -> None:
    """Raise CELoraError for a run.json that no run can have written."""
    record = {"asked": {}, **record}  # older runs have none
    kinds = {"given": dict, "train": dict, "lora": dict, "config": dict, "asked": dict, "r": int}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise CELoraError(f"{path} is not what a run wrote: {name!r} is missing or no {kind.__name__}")
    try:
        make_request(record["given"])
    except CELoraError as error:
        raise CELoraError(f"{path} is not what a run wrote: {error}") from error
    if record.get("status") == "finished" and not _is_summary(record.get("summary")):
        raise CELoraError(
            f"{path} is not what a run wrote: 'summary' is missing or holds no numbers of steps and seconds"
        )


def _is_summary(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(number, int | float | None) for number in value.values())
        and None not in (value.get("step"), value.get("seconds"))
    )


def _check_same_run(before: Mapping[str, Any], request: TrainRequest) -> None:
    """Raise CELoraError for an argument that would make the rest of a resumed run a different run."""
    earlier = make_request(before["given"])
    settled = dataclasses.asdict(earlier.options) | before["train"] | before["lora"] | earlier.given
    changed = {
        name: (settled.get(name), value)
        for name, value in request.given.items()
        if not (name in RESUMABLE or name.startswith(RESUMABLE_PREFIXES) or name in ("output", "preset", "celora"))
        and settled.get(name) != value
    }
    if (CELoraConfig.from_dict(before["config"]), before["r"]) != (request.config, request.r):
        changed["the estimator's configuration"] = (before.get("preset"), request.preset)
    if (count := before.get("processes", processes())) != processes():
        changed["the number of processes"] = (count, processes())
    for name, (old, new) in changed.items():
        moved = name in PATHS and isinstance(old, str) and Path(old).is_absolute() and not Path(old).exists()
        then = "put it back, or a link to it" if moved else "start a new run instead"
        raise CELoraError(f"--resume cannot change {name} ({old!r} -> {new!r}); {then}")


def _absolute(name: str, value: object) -> object:
    """Make local paths absolute, so that --resume works from another folder. Names on the hub stay unchanged."""
    if name not in PATHS or not isinstance(value, str):
        return value
    check_name(name, value)
    path = Path(value).expanduser()
    if is_stream(path):
        return value  # refused later, under its own name
    if path.is_file():  # a link keeps its name: its ending counts, and the hub's cache links to files without one
        return str(path.parent.resolve() / path.name)
    return str(path.resolve()) if path.exists() or name == "output" else value


def device_defaults(values: Mapping[str, object]) -> dict[str, object]:
    """Defaults that depend on the machine. Without CUDA nothing is autocast: the model's dtype counts."""
    import torch

    from celora.machine.device import accelerator

    cuda = torch.cuda.is_available() and not values.get("use_cpu")
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False) and not values.get("fp16")
    pinned = cuda and values.get("dataloader_pin_memory", True)
    copies = {"accelerator_config": {"non_blocking": True}} if pinned else {}
    return {"use_cpu": accelerator() is None, "bf16": bf16, "dataloader_pin_memory": cuda, **copies}


def sft_config(request: TrainRequest) -> Any:
    """TRL's SFTConfig for this run. Call it late: making one resets Accelerate's state of the whole process."""
    from trl import SFTConfig

    train = request.train | {"dataset_text_field": "text"}  # `load_rows` always uses this name
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if new in known_fields() and old in train:
            # transformers renamed these and warns about the old names, even when they say "off".
            train[new], train[old] = train.get(new, train[old]), None
    # The model is loaded already, and TRL would warn that it ignores `model_init_kwargs`.
    own = {name: value for name, value in train.items() if name not in ("disable_tqdm", "model_init_kwargs")}
    own |= {name: float(own[name]) for name in ("adam_beta1", "adam_beta2") if name in own}  # torch refuses 0, not 0.0
    try:
        args = SFTConfig(output_dir=str(request.output), disable_tqdm=True, **own)
    except Exception as error:  # whatever TRL, transformers and accelerate raise about a value
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        texts = {name: repr(value) for name, value in own.items() if isinstance(value, str)}
        unnamed = [f"{name}={text}: " for name, text in texts.items() if text in str(error) and name not in str(error)]
        raise CELoraError(f"{unnamed[0] if len(unnamed) == 1 else ''}{kind}{error}") from error
    template = args.chat_template_path
    if template is not None and not Path(template).expanduser().is_file():
        raise CELoraError(
            f"chat_template_path={template!r} is no file; give one with a template, like FOLDER/chat_template.jinja. "
            "The tokens that a folder's tokenizer adds would have no embedding"
        )
    if template is not None and not template.endswith((".jinja", ".j2")):
        raise CELoraError(
            f"chat_template_path={template!r}; TRL reads templates from .jinja and .j2 files alone, so rename the file"
        )
    if template is not None and not Path(template).expanduser().read_bytes().strip():
        raise CELoraError(
            f"chat_template_path={template!r} is an empty file; give one with a template, or leave it out"
        )
    if args.activation_offloading and args.device.type == "cpu":
        raise CELoraError("activation_offloading=True needs an accelerator to take activations off; leave it out")
    return args
