"""Writes the model card, README.md beside every saved adapter: what was trained, on what, how well, how to load it.

The card is made to be published. So it names models, data sets and folders, and never a path of this machine. celora
never overwrites a card that a user has written or claimed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from celora.files import write_text
from celora.train.output.folder import CARD, CARD_MARK, is_own
from celora.train.output.picture import loss_picture
from celora.train.rows.answers import Learnt
from celora.train.rows.places import HUB_NAME

PICTURE = "loss.svg"
_DIGITS = 16  # of a fingerprint, on the card
_LOAD = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base}  # {where}
adapter = {adapter}  # the folder that this file is in
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base, dtype={dtype}{revision})
model = PeftModel.from_pretrained(model, adapter)

{inputs}
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_ELSEWHERE = """\
celora export {adapter} --to gguf --gguf base.gguf   # base.gguf: the base model as llama.cpp has it
llama-server -m base.gguf --lora {adapter}-gguf/adapter.gguf
ollama create mine -f {adapter}-gguf/Modelfile
"""
_CHAT = """\
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_TEXT = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'


@dataclass(frozen=True)
class Card:
    """What the card of a run needs: a name, the content of run.json, the number of rows, and the run's clock."""

    name: str
    record: Mapping[str, Any]
    rows: int
    learnt: Learnt
    elapsed: Callable[[], float]

    def write(self, folder: Path, trainer: Any) -> None:
        """Write the card and the picture of the losses into a folder, unless the user's own card is there."""
        path = folder / CARD
        if not is_own(path):
            if picture := loss_picture(trainer.state.log_history):
                write_text(folder / PICTURE, picture)
            write_text(path, self.text(trainer, folder))

    def text(self, trainer: Any, folder: Path) -> str:
        """The card for the adapter that is being saved in `folder`."""
        given = self.record["given"]
        base, on_hub = public_name(given["model"])
        tables = (
            ("Data", self._data(trainer)),
            ("Settings", self._settings(trainer)),
            ("Result", self._result(trainer, folder)),
        )
        parts = [
            f"---\n{self._front_matter(trainer, base if on_hub else None)}---\n\n{CARD_MARK}\n",
            f"# {_cell(self.name)}\n",
            f"A LoRA adapter for `{_cell(base)}`, trained with celora {self.record['celora']}.\n",
            f"## How to load it\n\n```python\n{self._load(trainer, base, on_hub)}```\n",
        ]
        adapter = _adapter(trainer)
        more = adapter.use_dora or adapter.lora_bias or adapter.modules_to_save or adapter.bias != "none"
        if not more and not _adapts_embedding(trainer.model):  # else llama.cpp cannot load it
            commands = _ELSEWHERE.format(adapter=shlex.quote(self.name))
            parts.append(f"In llama.cpp and Ollama:\n\n```bash\n{commands}```\n")
        if loss_picture(trainer.state.log_history):
            parts.append(f"![Losses by optimizer step]({PICTURE})\n")
        for title, rows in tables:
            lines = (f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, ""))
            parts.append("\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""]))
        return "\n".join(parts)

    def _front_matter(self, trainer: Any, hub_base: str | None) -> str:
        """The metadata that the hub reads from a card, as YAML."""
        data, on_hub = public_name(self.record["given"]["data"])
        found: dict[str, Any] = {"base_model": hub_base} if hub_base else {}
        found |= {"datasets": [data]} if on_hub else {}
        found |= {"license": licence} if (licence := _licence(self.record["given"]["model"])) else {}
        found["library_name"] = "peft"
        if _adapter(trainer).task_type == "CAUSAL_LM":
            found["pipeline_tag"] = "text-generation"
        tags = [f"base_model:adapter:{hub_base}"] if hub_base else []
        found["tags"] = [*tags, "celora", "lora", "sft", "transformers", "trl"]
        return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)

    def _load(self, trainer: Any, base: str, on_hub: bool) -> str:
        revision = self.record["lora"].get("model_revision", "main")
        return _LOAD.format(
            base=json.dumps(base),
            where="its name on the hub" if on_hub else _where(base),
            adapter=json.dumps(self.name),
            dtype=json.dumps(_dtype(trainer)),
            revision=f", revision={json.dumps(revision)}" if on_hub and revision != "main" else "",
            inputs=_CHAT if self.record["turns"] else _TEXT,
        )

    def _data(self, trainer: Any) -> dict[str, Any]:
        given = self.record["given"]
        found: dict[str, Any] = {"training data": self._source("data", given["data"]), "rows": f"{self.rows:,}"}
        found["tokens"] = f"{self.learnt.tokens:,}; {self.learnt.share} are learnt: {self.learnt.part}"
        if trainer.eval_dataset is not None:
            found["evaluation data"] = self._source("evaluation data", given.get("eval_data") or given["data"])
        return found

    def _source(self, kind: str, source: str) -> str:
        digest = self.record["made_from"].get(f"{kind} in {source!r}")
        return f"`{public_name(source)[0]}`" + (f", fingerprint {digest[:_DIGITS]}" if digest else "")

    def _settings(self, trainer: Any) -> dict[str, Any]:
        args, adapter = trainer.args, _adapter(trainer)
        targets = adapter.target_modules
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        batch = f"{args.per_device_train_batch_size} rows"
        for count, name in ((args.gradient_accumulation_steps, "accumulated"), (self.record["processes"], "processes")):
            batch += f" x {count} {name}" if count > 1 else ""
        return {
            "preset": self.record["preset"] or f"none; estimator {self.record['config']['estimator']}",
            "LoRA": f"r = {adapter.r}, alpha = {adapter.lora_alpha:g}, dropout = {adapter.lora_dropout:g}",
            "target modules": targets if isinstance(targets, str) else ", ".join(sorted(targets or ())),
            "learning rate": f"{args.learning_rate:g}, {schedule}",
            "batch": batch,
            "longest row": f"{args.max_length:,} tokens" if args.max_length else None,
            "packing": args.packing_strategy if args.packing else None,
            "dtype of the base model": _dtype(trainer),
            "seed": args.seed,
        }

    def _result(self, trainer: Any, folder: Path) -> dict[str, Any]:
        state, versions = trainer.state, self.record["versions"]
        best = Path(state.best_model_checkpoint or "").name
        is_best = trainer.args.load_best_model_at_end and not folder.name.startswith("checkpoint-")
        names = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl") if name in versions]
        machine = self.record["machine"]
        return {
            "optimizer steps": f"{state.global_step:,} ({state.epoch or 0:.2f} epochs)",
            "adapter": f"that of {best}, the best" if is_best and best else None,
            "training loss": _last(state.log_history, "loss"),
            "evaluation loss": _last(state.log_history, "eval_loss"),
            "the same on the original base": _last(state.log_history, "eval_base_loss"),
            "time": f"{self.elapsed():,.0f} s on {machine['device']}; threads: {machine['threads']}",
            "versions": ", ".join(names),
        }


def _adapts_embedding(model: Any) -> bool:
    return any("lora_embedding_A" in name for name, _ in model.named_parameters())


def _where(base: str) -> str:
    if base.endswith(".gguf"):
        return "a folder that this GGUF file was converted into, as celora keeps it in its cache"
    return "the folder of the base model"


def public_name(source: str) -> tuple[str, bool]:
    """A name for a model or a data set, without a path of this machine, and whether it is the hub's name."""
    path = Path(source).expanduser()
    for part in path.parts:  # the hub's cache: models--OWNER--NAME/snapshots/REVISION
        if part.startswith(("models--", "datasets--")):
            return "/".join(part.split("--")[1:]), True
    if HUB_NAME.fullmatch(source) and not path.exists():
        return source, True
    return path.name or "model", False


def _licence(model: str) -> str | None:
    """The licence in the base model's own card; None if that card is not on this machine."""
    folder = Path(model).expanduser()
    card: Any = folder / CARD if folder.is_dir() else None
    if card is None and HUB_NAME.fullmatch(model):
        card = try_to_load_from_cache(model, CARD)
    try:
        found = getattr(ModelCard(Path(card).read_text(encoding="utf-8")).data, "license", None)
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def _adapter(trainer: Any) -> Any:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.peft_config[model.active_adapters[0]]


def _dtype(trainer: Any) -> str:
    return str(trainer.accelerator.unwrap_model(trainer.model).get_base_model().dtype).removeprefix("torch.")


def _last(history: list[dict[str, Any]], key: str) -> str | None:
    found = next((row[key] for row in reversed(history) if key in row), None)
    return None if found is None else f"{float(found):.4f}"


def _cell(value: object) -> str:
    """Text on one line, escaped for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
