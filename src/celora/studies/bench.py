"""The whole training step and its parts, for PEFT as people use it and for celora: what `celora bench` measures.

Every arm is a `transformers.Trainer` with its defaults around a model of its own, over the same frozen weights, and
takes its steps in turns with the others on the same batches. Peak memory is measured in a process for each arm.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import celora
from celora.errors import CELoraError, unknown
from celora.files import write_text
from celora.machine.device import accelerator, default_device
from celora.machine.memory import forget_peak, peak_memory, saved_for_backward
from celora.machine.timing import percentiles, timed
from celora.modeling.graft import LayerGraft
from celora.modeling.survey import survey
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Dense
from celora.planning.plan import Plan
from celora.studies.assets import demo_model
from celora.studies.sentiment import splits, to_rows
from celora.train.loading import quiet_libraries
from celora.train.prepare import prepared
from celora.train.request.arguments import make_request

Batch = dict[str, Tensor]
ARMS = {
    "PEFT": "Transformers' Trainer around a PEFT model, with their defaults",
    "PEFT + compile": "the same with torch.compile",
    "PEFT upper half": "the same with LoRA on the upper half of the layers only",
    "exact": "celora's preset exact",
    "exact + compile": "the same with torch.compile, which takes the fused adapters only",
    "paper": "celora's preset paper",
    "auto": "celora's preset auto",
    "limit": "PEFT with a free grad_input of its adapted layers (zeros: does not train)",
    "limit of exact": "preset exact with the same",
    "Liger": "PEFT with Liger's kernels",
    "Unsloth": "Unsloth's own LoRA",
}
DATA = {
    "full": "4 x 256 tokens, every one labelled",
    "instruct": "4 sequences of 64 to 256 tokens, the last 30 % of each labelled",
    "demo": "8 sentences of the demo's reviews, their sentiment labelled",
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = ("bfloat16", "float32")
SMOLLM2 = "smollm2"
_NAME = re.compile(r"h(\d+)-v(\d+)k")
_LAYERS = {2048: 4}  # others have 8: a step should take seconds
_BATCHES = 8  # ragged ones: what they waste should be what such batches waste on average


def _heads(hidden: int) -> int:
    return max(1, hidden // 64)


@dataclass(frozen=True)
class Cell:
    """One model on one kind of data.

    Attributes:
        model: `smollm2`, or `h1024-v32k` for a Llama of random weights with hidden size 1024 and 32,000 words.
        data: a key of `DATA`.
        dtype: of the base; adapters are float32, as PEFT makes them.
        tokens: of a `full` batch.
    """

    model: str
    data: str
    dtype: str = "bfloat16"
    tokens: int = 1024

    def __post_init__(self) -> None:
        named = _NAME.fullmatch(self.model)
        if self.model != SMOLLM2 and not named:
            raise CELoraError(f"model {self.model!r}; expected {SMOLLM2} or a shape like h1024-v32k.")
        if named and (0 in map(int, named.groups()) or int(named[1]) % (2 * _heads(int(named[1])))):
            raise CELoraError(
                f"model {self.model!r}; expected words, and a hidden size that heads of about 64 can share."
            )
        if self.data not in DATA:
            raise unknown("data", self.data, DATA)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.data == "demo" and self.model != SMOLLM2:
            raise CELoraError(f"data 'demo' is text; it needs the model {SMOLLM2}, not {self.model!r}.")


QUICK = (Cell(SMOLLM2, "demo"),)
USUAL = (Cell(SMOLLM2, "demo"), Cell(SMOLLM2, "full"), Cell("h1024-v32k", "full"), Cell("h1024-v32k", "instruct"))
QUICK_ARMS = ("PEFT", "exact", "paper", "auto", "limit")


def parse_cell(text: str) -> Cell:
    """`MODEL:DATA` or `MODEL:DATA:DTYPE` as a cell."""
    parts = text.split(":")
    if not 2 <= len(parts) <= 3:
        raise CELoraError(f"cell {text!r}; expected MODEL:DATA or MODEL:DATA:DTYPE, like h1024-v32k:instruct.")
    return Cell(parts[0], parts[1], parts[2] if len(parts) == 3 else DTYPES[0])


def not_runnable(arm: str) -> str:
    """Why this arm cannot run here, or ''."""
    package = {"Liger": "liger_kernel", "Unsloth": "unsloth"}.get(arm)
    if package and not torch.cuda.is_available():
        return "needs a CUDA device"
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return ""


def measure(
    cell: Cell,
    arms: Sequence[str],
    *,
    repeats: int = 8,
    memory: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each arm: times of the step and its parts in ms, tokens per second, memory, speed-up over PEFT."""
    for arm in arms:
        if arm not in ARMS:
            raise unknown("arm", arm, ARMS)
    batches = make_batches(cell)
    runnable = [arm for arm in arms if not not_runnable(arm)]
    with tempfile.TemporaryDirectory() as scratch:
        plan_file = Path(scratch) / "plan.json"
        steps: dict[str, Step] = {}
        frozen: dict[str, Tensor] = {}
        for arm in runnable:
            say(f"{cell.model}, {cell.data}, {cell.dtype}: preparing {arm}")
            steps[arm] = Step(cell, arm, batches, plan_file, frozen)
        say(f"{cell.model}, {cell.data}, {cell.dtype}: timing")
        times = _take_turns(steps, batches, repeats)
        saved = {arm: step.saved(batches[0]) for arm, step in steps.items()}
        del steps
        gc.collect()
        peaks = {arm: _peak_memory(cell, arm, plan_file) if memory else None for arm in runnable}
    real = statistics.fmean(int(batch["attention_mask"].sum()) for batch in batches)
    labelled = statistics.fmean(int((batch["labels"] != -100).sum()) for batch in batches)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        row: dict[str, Any] = asdict(cell) | {"arm": arm, "tokens": round(real), "labelled": round(labelled / real, 3)}
        if reason := not_runnable(arm):
            rows.append(row | {"not_run": reason})
            continue
        whole = percentiles([sum(parts) for parts in times[arm]])
        forward, backward, optimizer = (statistics.median(of) for of in zip(*times[arm], strict=True))
        row |= whole | {
            "forward_ms": round(forward, 3),
            "backward_ms": round(backward, 3),
            "optimizer_ms": round(optimizer, 3),
            "tokens_per_second": round(1e3 * real / whole["time_ms"], 1),
            "saved_for_backward": saved[arm],
            "peak_memory": peaks[arm],
        }
        rows.append(row)
    return _relative(rows)


def _relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each arm's speed-up over PEFT, and its share of what could be saved: by preset exact with a free backward of
    the frozen layers or, where that was not measured, by such a backward alone; none where that saved nothing."""
    by_arm = {row["arm"]: row["time_ms"] for row in rows if "time_ms" in row}
    plain, limit = by_arm.get("PEFT"), by_arm.get("limit of exact", by_arm.get("limit"))
    for row in rows:
        if plain and "time_ms" in row:
            row["speed_up"] = round(plain / row["time_ms"], 4)
            if limit and limit < plain:
                row["share_of_limit"] = round((plain - row["time_ms"]) / (plain - limit), 3)
    return rows


def _take_turns(
    steps: dict[str, Step], batches: Sequence[Batch], repeats: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Times of forward, backward and optimizer of `repeats` steps of each arm, after each has seen every batch."""
    times: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in steps}
    for turn, batch in zip(range(len(batches) + repeats), itertools.cycle(batches), strict=False):
        for arm, step in steps.items():
            parts = step(batch)
            if turn >= len(batches):
                times[arm].append(parts)
    return times


class Step:
    """The training step of one arm, as Trainer takes it.

    Arm `auto` makes its plan and writes it to `plan_file`, or takes the one that is there. The model's frozen weights
    become those in `frozen`, which gets the ones that are not there yet: many arms of a large model fit into memory.
    """

    def __init__(
        self, cell: Cell, arm: str, batches: Sequence[Batch], plan_file: Path, frozen: dict[str, Tensor]
    ) -> None:
        self.model: Any = _unsloth(cell) if arm == "Unsloth" else make_model(cell, upper=arm == "PEFT upper half")
        if arm != "Unsloth":  # which changes the weights it loads
            for name, p in self.model.named_parameters():
                if not p.requires_grad:
                    p.data = frozen.setdefault(name.replace(".base_layer", ""), p.data)
        self.model.train()
        _attach(self.model, arm, batches, plan_file)
        arguments = TrainingArguments(
            str(plan_file.parent),
            report_to="none",
            use_cpu=accelerator() is None,
            use_liger_kernel=arm == "Liger",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        self.trainer = Trainer(self.model, arguments)
        self.optimizer = self.trainer.create_optimizer()
        self.run = torch.compile(self.model) if arm.endswith("+ compile") else self.model

    def __call__(self, batch: Batch) -> tuple[float, float, float]:
        """Milliseconds of forward, backward and optimizer."""
        loss: list[Tensor] = []
        return (
            timed(lambda: loss.append(self._forward(batch))),
            timed(lambda: self.trainer.accelerator.backward(loss[0])),
            timed(self._update),
        )

    def saved(self, batch: Batch) -> int:
        """Bytes that a forward saves for backward."""
        with saved_for_backward(self.model) as saved:
            self._forward(batch)
        return saved.nbytes

    def _forward(self, batch: Batch) -> Tensor:
        inputs = {key: value.to(self.model.device) for key, value in batch.items()}
        with self.trainer.compute_loss_context_manager():
            loss: Tensor = self.trainer.compute_loss(
                self.run, inputs, num_items_in_batch=(inputs["labels"] != -100).sum()
            )
        return loss

    def _update(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(parameters, self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_model(cell: Cell, *, upper: bool = False) -> PeftModel:
    """The cell's model with LoRA r=16 on all linear layers, on the device that Trainer would take."""
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    if cell.model == SMOLLM2:
        base = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype, trust_remote_code=False)
    else:
        base = AutoModelForCausalLM.from_config(shape_config(cell), dtype=dtype, trust_remote_code=False)
    half = base.config.num_hidden_layers // 2
    lora = LoraConfig(
        r=16,
        target_modules=LINEAR,
        layers_to_transform=list(range(half, 2 * half)) if upper else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora).to(default_device())


def make_batches(cell: Cell) -> list[Batch]:
    """A few batches; every arm gets the same."""
    if cell.data == "demo":
        return _demo_batches()
    generator = torch.Generator().manual_seed(0)
    words = 49152 if cell.model == SMOLLM2 else shape_config(cell).vocab_size
    width = min(256, cell.tokens)
    batches = []
    for _ in range(2 if cell.data == "full" else _BATCHES):
        tokens = torch.randint(0, words, (max(1, cell.tokens // width), width), generator=generator)
        mask = labelled = torch.ones_like(tokens, dtype=torch.bool)
        if cell.data == "instruct":
            lengths = torch.randint(width // 4, width + 1, (len(tokens), 1), generator=generator)
            place = torch.arange(width)[None]
            mask = place < lengths
            labelled = mask & (place >= (0.7 * lengths).long())
            longest = int(lengths.max())  # as a collator pads
            tokens, mask, labelled = tokens[:, :longest], mask[:, :longest], labelled[:, :longest]
        labels = torch.where(labelled, tokens, -100)
        batches.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return batches


def _demo_batches() -> list[Batch]:
    """Made as `celora train` makes them for the demo."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        chosen = splits(train=8 * _BATCHES, seed=0).train
        write_text(rows, "".join(json.dumps(row) + "\n" for row in to_rows(chosen)))
        request = make_request({"model": str(demo_model()), "data": str(rows), "output": scratch, "preset": "off"})
        with prepared(request, 8, None) as (trainer, _):
            return [dict(batch) for batch in trainer.get_train_dataloader()]


def shape_config(cell: Cell) -> LlamaConfig:
    """The Llama of random weights that a cell other than SmolLM2's names."""
    named = _NAME.fullmatch(cell.model)
    assert named is not None
    hidden, words = int(named[1]), 1000 * int(named[2])
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=_LAYERS.get(hidden, 8),
        num_attention_heads=_heads(hidden),
        num_key_value_heads=_heads(hidden),
        vocab_size=words,
    )


def _attach(model: PeftModel, arm: str, batches: Sequence[Batch], plan_file: Path) -> None:
    if arm == "auto":
        plan = Plan.load(plan_file) if plan_file.exists() else celora.make_plan(model, batches)
        plan.save(plan_file)
        celora.attach(model, plan)
    elif arm in ("exact", "exact + compile", "paper"):
        celora.attach(model, arm.removesuffix(" + compile"))
    elif arm in ("limit", "limit of exact"):
        if arm == "limit of exact":
            celora.attach(model, "exact")
        _make_free(model)


class _Free(Dense):
    """Leaves the whole product out."""

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output.new_zeros(grad_output.shape[0], weight.shape[1])


def _make_free(model: PeftModel) -> None:
    for layer in survey(model).layers.values():
        base: Any = layer.base
        found = next((hook for hook in base._forward_hooks.values() if isinstance(hook, LayerGraft)), None)
        graft = found or LayerGraft(_Free(*layer.shape), Switch())
        graft.estimator, graft.mode = _Free(*layer.shape), Mode.ESTIMATE
        if found is None:
            base.register_forward_hook(graft)


def _unsloth(cell: Cell) -> Any:
    """Unsloth loads from a folder and patches what it loads."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        source = demo_model() if cell.model == SMOLLM2 else folder
        if cell.model != SMOLLM2:
            make_model(cell).get_base_model().save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            str(source),
            dtype=getattr(torch, cell.dtype),
            load_in_4bit=False,
            max_seq_length=cell.tokens,
            trust_remote_code=False,
        )
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=8, target_modules=LINEAR, use_gradient_checkpointing=False
    )


def _peak_memory(cell: Cell, arm: str, plan_file: Path) -> int | None:
    """Peak of a process while it takes a few steps of this arm alone, with model and plan already made."""
    asked = json.dumps({"cell": asdict(cell), "arm": arm, "plan": str(plan_file)})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, asked], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CELoraError(f"measuring the memory of {arm!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: int | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _run_alone(asked: dict[str, Any]) -> int | None:
    cell = Cell(**asked["cell"])
    batches = make_batches(cell)
    step = Step(cell, asked["arm"], batches, Path(asked["plan"]), {})
    forget_peak(step.model.device)
    for batch in batches[:4]:
        step(batch)
    return peak_memory(step.model.device)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text: one line for each arm of each cell."""
    lines = [("model", "data", "dtype", "arm", "ms/step", "20-80 %", "tokens/s", "speed-up", "of limit", "MiB peak")]
    for row in rows:
        name = (row["model"], row["data"], row["dtype"], row["arm"])
        if "not_run" in row:
            lines.append((*name, f"not run: {row['not_run']}", "", "", "", "", ""))
            continue
        peak, share = row["peak_memory"], row.get("share_of_limit")
        lines.append(
            (
                *name,
                f"{row['time_ms']:.0f}",
                f"{row['p20_ms']:.0f}-{row['p80_ms']:.0f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['speed_up']:.2f}" if "speed_up" in row else "",
                "" if share is None else f"{share:.0%}",
                "" if peak is None else f"{peak / 2**20:.0f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, told(row["model"] for row in rows)])


def told(models: Iterable[str]) -> str:
    """What the models of cells are, in words."""
    sentences = []
    for name in dict.fromkeys(models):
        if name == SMOLLM2:
            sentences.append(f"{name}: SmolLM2-135M-Instruct, its weights unpacked from 4 bits (Q4_1).")
        else:
            config = shape_config(Cell(name, "full"))
            sentences.append(
                f"{name}: a Llama of random weights, hidden size {config.hidden_size:,}, "
                f"{config.num_hidden_layers} blocks, {config.vocab_size:,} words."
            )
    return " ".join(sentences)


if __name__ == "__main__":
    with quiet_libraries():
        print(json.dumps(_run_alone(json.loads(sys.argv[1]))))
