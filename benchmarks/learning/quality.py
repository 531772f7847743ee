"""How estimates change what is learnt, on several tasks: CE-LoRA against LoRA and its cheap rivals.

SmolLM2-135M-Instruct, bfloat16, LoRA r=16 on all linear layers, 40 steps of 8 rows through `celora train`, on the tasks
of `quality_tasks.py`. Each arm may try several learning rates (`--rates`): the best on the validation rows with seed 0
counts; of rates with equal scores, the one with the lowest loss. While the best is at the edge of the grid, the grid
grows. The other seeds use the same rate. Only test scores are reported, and the untouched base is judged with every
adapter. Arms:

* `untouched`; `LoRA`; `upper half`: LoRA on the upper half of the layers only, a cheaper rival that estimates nothing;
* `paper`, `auto`, `fast`;
* `LoRA, auto's time` and `upper half, auto's time`: as many steps as fit into the time that `auto` takes;
* `LoRA, 50 steps`, and `upper half, 50 steps' time` and `auto, 50 steps' time`: as many steps as fit into the time that
  the whole command takes for 50 steps of LoRA, from its start to the saved adapter. The same for 200 steps.

`python -m benchmarks.learning.quality run` trains and judges missing runs, one by one, into `quality.jsonl`. It can be
stopped and started again at any time. `python -m benchmarks.learning.quality time` measures the steps of the arms in
turns, on an otherwise idle machine, into `quality-time.jsonl`: all times of a task come from one call. So does
`... quality command`, for the arms of the whole command's time, into `quality-command.jsonl`. It also runs a command of
one step for each arm, once a task, with the rows of 50 steps for LoRA, of 150 for the others, and for `auto` with an
empty cache of measurements. What counts of these is the median over the tasks. So all tasks are timed before any is
trained. The arms of equal time need their times; until then `run` leaves them out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import celora
from benchmarks import rows
from benchmarks.learning import quality_tasks
from benchmarks.steps.adapter import forget_measurements
from benchmarks.steps.adapter import train as command
from celora.machine.allocator import keep_freed_memory
from celora.machine.timing import interleaved
from celora.studies.assets import demo_model
from celora.train.choose import choose
from celora.train.loading import quiet_libraries
from celora.train.prepare import prepared
from celora.train.request.arguments import TrainRequest, make_request
from celora.train.run import train

STEPS, BATCH = 40, 8
RATES = (1e-3, 5e-4, 2e-3)
PRESETS = ("paper", "auto", "fast")
TIMED = ("LoRA", "upper half", *PRESETS)
CONTENDERS = ("LoRA", "upper half", "auto")  # get the time of a whole command
LORA_STEPS = (50, 200)  # steps of LoRA, whose commands' time that is


def command_arm(arm: str, steps: int) -> str:
    """The arm that gets the time of `steps` steps of LoRA, from the start of the command to the saved adapter."""
    return f"{arm}, {steps} steps" + ("" if arm == "LoRA" else "' time")


COMMAND_ARMS = tuple(command_arm(arm, steps) for steps in LORA_STEPS for arm in CONTENDERS)
ARMS = ("untouched", *TIMED, "LoRA, auto's time", "upper half, auto's time", *COMMAND_ARMS)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RESULTS, TIMES, COMMANDS = (
    Path(__file__).with_name(f"{name}.jsonl") for name in ("quality", "quality-time", "quality-command")
)
Say = Callable[[str], None]


def settings(task: str, arm: str, output: Path, *, seed: int = 0, **more: Any) -> dict[str, Any]:
    """The settings of an arm's training run, whose rows are written to `output`."""
    chosen = quality_tasks.task(task)
    data = output / "train.jsonl"
    rows.write(data, quality_tasks.shuffled(chosen.train, seed, more.get("max_steps", STEPS) * BATCH))
    run_settings: dict[str, Any] = {
        "model": str(demo_model()), "data": str(data), "output": str(output / "run"), "seed": seed, "quiet": True,
        "dtype": "bfloat16", "lora_r": 16, "lora_alpha": 32, "per_device_train_batch_size": BATCH,
        "max_steps": STEPS, "warmup_steps": STEPS // 10, "save_strategy": "no", "preset": "off", **more,
    }  # fmt: skip
    if arm.startswith("upper half"):
        layers = AutoConfig.from_pretrained(demo_model()).num_hidden_layers
        block = {name: "mlp" if name.split("_")[0] in ("gate", "up", "down") else "self_attn" for name in LINEAR}
        run_settings["lora_target_modules"] = [
            f"layers.{i}.{block[name]}.{name}" for i in range(layers // 2, layers) for name in LINEAR
        ]
    if (preset := arm.split(",")[0]) in PRESETS:
        run_settings["preset"] = preset
    return run_settings


def request(task: str, arm: str, output: Path, **more: Any) -> TrainRequest:
    """The training run of an arm."""
    return make_request(settings(task, arm, output, **more))


def untouched(task: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16)
    return _judged(task, model, "validation") | _judged(task, model, "test") | {"cost": None}


def trained(task: str, arm: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """Scores after training. The seed that chooses the rate also scores validation rows.

    Test rows are scored unless another rate has been chosen.
    """
    model, same = _train(task, arm, seed, rate, steps)
    if seed == 0:
        same |= _judged(task, model, "validation")
        if best([*_tried(task, arm, steps), same]) is not same:
            return same | {"test": None}
    return same | _judged(task, model, "test")


def _train(task: str, arm: str, seed: int, rate: float, steps: int) -> tuple[Any, dict[str, Any]]:
    """The trained model without celora, and the summary of its training."""
    with tempfile.TemporaryDirectory() as scratch:
        own = {"learning_rate": rate, "max_steps": steps, "warmup_steps": steps // 10}
        result = train(request(task, arm, Path(scratch), seed=seed, **own), console=Console(stderr=True))
    if result.status != "finished":
        raise KeyboardInterrupt
    celora.detach(result.model)
    return result.model, {"cost": result.summary["estimated_cost"], "train_loss": result.summary["loss"]}


def _judged(task: str, model: Any, part: str) -> dict[str, Any]:
    judged, tokenizer = quality_tasks.task(task), AutoTokenizer.from_pretrained(demo_model())
    held_out = getattr(judged, part)
    loss = round(quality_tasks.loss(model, tokenizer, held_out), 5)
    score = round(judged.judge(model, tokenizer, held_out), 5) if judged.higher_is_better else loss
    return {
        "metric": judged.metric, "higher_is_better": judged.higher_is_better, "held_out": len(judged.test),
        part: score, f"{part}_loss": loss,
    }  # fmt: skip


def steps_in_autos_time(task: str) -> dict[str, int]:
    """How many steps the arms of equal time may take, as far as the times are measured."""
    ms = {row["arm"]: row["time_ms"] for row in rows.found(TIMES) if row["task"] == task}
    rivals = [arm for arm in ("LoRA", "upper half") if {arm, "auto"} <= set(ms)]
    return {f"{arm}, auto's time": max(1, round(STEPS * ms["auto"] / ms[arm])) for arm in rivals}


def steps_in_the_time(task: str) -> dict[str, int]:
    """How many steps each arm of equal time may take, as far as the times are measured.

    A command of n steps takes the time of a command of one step, and n - 1 steps. The former differs little between
    tasks: its median counts.
    """
    budget, timed = steps_in_autos_time(task), command_times(task)
    for steps, (arm, (first, step)) in itertools.product(LORA_STEPS, timed.items()):
        spared = timed["LoRA"][0] - first + (steps - 1) * timed["LoRA"][1]
        budget[command_arm(arm, steps)] = steps if arm == "LoRA" else 1 + math.floor(spared / step)
    return budget


def command_times(task: str) -> dict[str, tuple[float, float]]:
    """Seconds of a command of one step, and of each further step, by arm."""
    found = rows.found(COMMANDS)
    return {
        row["arm"]: (
            statistics.median(other["first_s"] for other in found if other["arm"] == row["arm"]),
            row["time_ms"] / 1000,
        )
        for row in found
        if row["task"] == task
    }


def run(tasks: list[str], arms: list[str], seeds: list[int], rates: list[float], say: Say) -> None:
    """Train and judge missing runs. The first seed tries all rates; the others use its best."""
    for task in tasks:
        budget = steps_in_the_time(task)
        for seed in seeds:
            for arm in arms:
                if "," in arm and arm not in budget:
                    what = "command" if arm in COMMAND_ARMS else "time"
                    first = f"python -m benchmarks.learning.quality {what} --tasks {task}"
                    say(f"{task}, {arm}: left out; `{first}` comes first")
                    continue
                steps = 0 if arm == "untouched" else budget.get(arm, STEPS)
                for rate in _rates(task, arm, steps, seed, rates):
                    key = {"task": task, "arm": arm, "seed": seed, "learning_rate": rate, "steps": steps}
                    if (steps == 0 and seed > 0) or any(key.items() <= row.items() for row in found()):
                        continue
                    scores = untouched(task) if steps == 0 else trained(task, arm, seed, rate, steps)
                    say(f"{key}: validation {scores.get('validation')}, test {scores['test']}")
                    rows.append(RESULTS, key | scores | rows.conditions(arm))


def _rates(task: str, arm: str, steps: int, seed: int, grid: Sequence[float]) -> Iterator[float]:
    """The learning rates to train with. Seed 0 tries the grid, and goes on while the best of several is at its edge."""
    if steps == 0:
        yield 0.0
    elif seed > 0:
        yield best_rate(task, arm, steps)
    else:
        yield from grid
        while len(grid) > 1:
            tried = [row["learning_rate"] for row in _tried(task, arm, steps)]
            chosen = best_rate(task, arm, steps)
            if chosen not in (max(tried), min(tried)):
                break
            yield 2 * chosen if chosen == max(tried) else chosen / 2


def found() -> list[dict[str, Any]]:
    """The rows of `run` that are there."""
    return rows.found(RESULTS)


def best_rate(task: str, arm: str, steps: int) -> float:
    """The rate with the best validation score of seed 0."""
    tried = _tried(task, arm, steps)
    if not tried:
        raise SystemExit(f"{task}, {arm}: seed 0 chooses the learning rate; run it first")
    return float(best(tried)["learning_rate"])


def best(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the best validation score; of several, that with the lowest validation loss, or the first."""

    def goodness(row: dict[str, Any]) -> tuple[float, float]:
        return row["validation"] * (1 if row["higher_is_better"] else -1), -row.get("validation_loss", math.inf)

    return max(tried, key=goodness)


def _tried(task: str, arm: str, steps: int) -> list[dict[str, Any]]:
    """The rows of seed 0, at all rates."""
    key = {"task": task, "arm": arm, "seed": 0, "steps": steps}
    return [row for row in found() if key.items() <= row.items()]


def time_steps(tasks: list[str], arms: list[str], repeats: int) -> None:
    """Times of whole optimizer steps, task by task."""
    for task in tasks:
        _replace(TIMES, task, repeats, {arm: {"time_ms": ms} for arm, ms in _step_times(task, arms, repeats).items()})


def time_commands(tasks: list[str], repeats: int) -> None:
    """The same, and the seconds from the start of a command of one step to its adapter."""
    for task in tasks:
        first = {arm: {"first_s": _first_step(task, arm)} for arm in CONTENDERS}
        times = _step_times(task, list(CONTENDERS), repeats)
        _replace(COMMANDS, task, repeats, {arm: first[arm] | {"time_ms": times[arm]} for arm in CONTENDERS})


def _first_step(task: str, arm: str) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        tokenised = LORA_STEPS[0] * (1 if arm == "LoRA" else 3)  # the rows of so many steps, for the one
        asked = settings(task, arm, Path(scratch), max_steps=tokenised) | {"max_steps": 1, "warmup_steps": 0}
        if arm == "auto":
            forget_measurements()
        preset = asked.pop("preset")
        return float(command(Path(scratch), preset, asked)["adapter_s"])


def _replace(path: Path, task: str, repeats: int, measured: dict[str, dict[str, float]]) -> None:
    """Write a task's times in the place of its older ones."""
    others = [row for row in rows.found(path) if row["task"] != task]
    common = {"repeats": repeats}
    rows.write(
        path,
        others + [{"task": task, "arm": arm} | own | common | rows.conditions(arm) for arm, own in measured.items()],
    )


def _step_times(task: str, arms: list[str], repeats: int) -> dict[str, float]:
    """Milliseconds of whole optimizer steps, in turns, on the same batches; each arm pads or packs as usual."""
    keep_freed_memory()
    with ExitStack() as stack:
        contenders: dict[str, Callable[[], object]] = {}
        for arm in arms:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            asked = request(task, arm, scratch)
            trainer, _ = stack.enter_context(prepared(asked, BATCH, None))
            chosen = choose(asked, trainer, Console(stderr=True, quiet=True), begun=False)
            celora.attach(trainer.model, chosen.config)
            trainer.create_optimizer()
            batches = [dict(batch) for batch in trainer.get_train_dataloader()][:6]
            contenders[arm] = functools.partial(_steps, trainer, batches)
        times = interleaved(contenders, repeats=repeats)
    return {arm: timed["time_ms"] / len(batches) for arm, timed in times.items()}


def _steps(trainer: Any, batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        trainer.training_step(trainer.model, dict(batch), (batch["labels"] != -100).sum())
        torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "time", "command"])
    parser.add_argument("--tasks", nargs="+", default=quality_tasks.NAMES, choices=quality_tasks.NAMES)
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="0 chooses the learning rates")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    with quiet_libraries():
        if options.what == "time":
            time_steps(options.tasks, options.arms or list(TIMED), options.repeats)
            return
        if options.what == "command":
            time_commands(options.tasks, options.repeats)
            return
        say = functools.partial(print, flush=True)
        run(options.tasks, options.arms or list(ARMS), options.seeds, options.rates, say)


if __name__ == "__main__":
    main()
