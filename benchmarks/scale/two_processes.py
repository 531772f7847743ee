"""Does the demo learn as much in two processes as in one?

Model, data, seeds and global batch are the same. There are three arms: one process, two with DDP (`celora train` under
torchrun), and two with FSDP2 (`celora.fsdp.shard`, a bare loop).

`python -m benchmarks.scale.two_processes --work FOLDER` writes two-processes.jsonl. Finished runs stay in FOLDER, and
are not repeated. Stock PEFT scores every adapter, in a process without celora.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from subprocess import run
from typing import Any

from benchmarks import rows
from celora.machine.timing import faster_dtype
from celora.studies import demo
from celora.studies.assets import demo_model
from celora.studies.sentiment import splits, to_rows

# One configuration for all arms, except that FSDP2 needs `synchronise` to gather less.
WAYS = ("one process", "DDP", "FSDP2")
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"preset": "off"},
    "CE-LoRA": {"preset": "paper", "celora": {"refresh_every": demo.REFRESH_EVERY}},
}
BATCH, HELD_OUT, VALIDATION = 8, 600, 600  # as the demo had them when this was measured
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def settings(arm: str, way: str, seed: int, steps: int, dtype: str, folder: Path, data: Path) -> dict[str, Any]:
    """The arguments of one run: the demo's, with its batch divided among the processes."""
    own = dict(ARMS[arm])
    if way == "FSDP2" and "celora" in own:
        own["celora"] = {**own["celora"], "synchronise": True}
    shared = demo.shared_settings(demo_model(), steps, BATCH // (1 if way == "one process" else 2), dtype)
    return shared | own | {
        "learning_rate": demo.LEARNING_RATE, "seed": seed, "data": str(data), "output": str(folder), "quiet": True
    }  # fmt: skip


def train(arm: str, way: str, seed: int, steps: int, dtype: str, folder: Path, data: Path) -> None:
    """One run, in processes of its own."""
    wanted = folder.with_suffix(".yaml")  # JSON is YAML
    wanted.write_text(json.dumps(settings(arm, way, seed, steps, dtype, folder, data)), encoding="utf-8")
    if way == "FSDP2":
        command = [*TORCHRUN, "-m", "benchmarks.scale.two_processes", "--sharded", str(wanted)]
    else:
        started = [sys.executable] if way == "one process" else TORCHRUN
        command = [*started, "-m", "celora", "train", "--config", str(wanted), "--overwrite"]
    run(command, check=True)


def train_sharded(wanted: Path) -> None:
    """One process of an FSDP2 run: a loop with the batches, optimizer and schedule of the Trainer.

    The Trainer itself cannot do it: Accelerate shards on accelerators only.
    """
    import torch
    import torch.distributed as dist

    import celora
    import celora.fsdp
    from celora.train.loading import load_model, load_tokenizer, lora_config, quiet_libraries, training_rows
    from celora.train.request.arguments import make_request, sft_config
    from celora.train.trainer import build_trainer

    request = make_request(json.loads(wanted.read_text(encoding="utf-8")))
    with quiet_libraries():
        args, tokenizer = sft_config(request), load_tokenizer(request)
        with args.main_process_first():
            data = training_rows(request, tokenizer)
        made = load_model(request)
        trainer = build_trainer(request, args, made, tokenizer, data, peft=lora_config(request))
        model, batches = trainer.model, iter(trainer.get_train_dataloader())
        celora.fsdp.shard(model)
        celora.attach(model, request.config)
        trainer.create_optimizer_and_scheduler(num_training_steps=args.max_steps)
        trained = [p for p in model.parameters() if p.requires_grad]
        model.train()
        for step in range(args.max_steps):
            # The mean of means: every sentence has as many labelled tokens as any other.
            loss = model(**next(batches)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            trainer.optimizer.zero_grad()
            if dist.get_rank() == 0 and step % 10 == 9:
                print(f"step {step + 1}  loss {loss.item():.4f}", file=sys.stderr)
        whole = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
        if dist.get_rank() == 0:
            model.save_pretrained(request.output, state_dict=whole)
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # some of gloo's threads outlive the interpreter: with torch 2.13 one exit in seven is an abort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for data and runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--way", action="append", choices=WAYS, help="repeatable; all without")
    parser.add_argument("--arm", action="append", choices=ARMS, help="repeatable; all without")
    parser.add_argument("--dtype", default=faster_dtype(), help="the faster one here, as in the demo")
    parser.add_argument("--sharded", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.sharded:
        train_sharded(asked.sharded)
    asked.work.mkdir(parents=True, exist_ok=True)
    held = asked.work / "test.jsonl"
    if not held.exists():
        rows.write(held, to_rows(splits(0, validation=VALIDATION, test=HELD_OUT).test))
    for seed in range(asked.seeds):
        data = asked.work / f"train-seed{seed}.jsonl"
        drawn = splits(seed, train=asked.steps * BATCH, validation=VALIDATION, test=HELD_OUT).train
        if not data.exists():
            rows.write(data, to_rows(drawn))
        for way in asked.way or WAYS:
            for arm in asked.arm or ARMS:
                folder = asked.work / f"{arm}-{way}-seed{seed}".lower().replace(" ", "-")
                done = folder.with_suffix(".json")
                if done.exists():
                    continue
                train(arm, way, seed, asked.steps, asked.dtype, folder, data)
                (accuracy,) = demo.stock_accuracies(demo_model(), held, asked.dtype, adapters=[folder], untouched=False)
                row = {"arm": arm, "way": way, "seed": seed, "accuracy": accuracy, "held_out": HELD_OUT}
                row |= {"steps": asked.steps, "batch": BATCH, "dtype": asked.dtype, **rows.conditions()}
                done.write_text(json.dumps(row), encoding="utf-8")
                print(json.dumps(row), flush=True)
                found = [json.loads(path.read_text(encoding="utf-8")) for path in asked.work.glob("*-seed*.json")]
                found.sort(key=lambda row: (list(ARMS).index(row["arm"]), WAYS.index(row["way"]), row["seed"]))
                rows.write(Path(__file__).with_name("two-processes.jsonl"), found)


if __name__ == "__main__":
    main()
