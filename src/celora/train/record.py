"""The record of a run (run.json) and its summary."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import celora
from celora.machine.device import device_name
from celora.machine.packages import PACKAGES, package_version
from celora.modeling.report import AttachReport
from celora.settings.config import CELoraConfig
from celora.train.processes import processes
from celora.train.progress import MetricsWriter, read_metrics
from celora.train.request.arguments import TrainRequest, recorded

_ON_THE_BASE = ("eval_base_loss", "eval_base_mean_token_accuracy")
_LAST = ("loss", "eval_loss", "tokens_seen", "mean_token_accuracy", "eval_mean_token_accuracy", *_ON_THE_BASE)


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. `status` is "finished", "interrupted" or "already finished".

    `model` is the trained model, with celora still attached; None if the run was already finished.
    """

    status: str
    output: Path
    step: int
    summary: dict[str, Any]
    model: Any = field(default=None, repr=False)


def longer(earlier: dict[str, Any], now: dict[str, Any], metrics: Path) -> bool:
    """Whether the run that is asked for now is longer than the finished one."""
    if (steps := now.get("max_steps", -1)) > 0:
        return bool(steps > earlier["summary"]["step"])
    if earlier["given"].get("max_steps", -1) > 0:
        before = next((row["epoch"] for row in reversed(read_metrics(metrics)) if "epoch" in row), 0.0)
    else:
        before = float(earlier["given"].get("num_train_epochs", 3))
    return float(now.get("num_train_epochs", 3)) > before


def is_evaluated(metrics: Path, trainer: Any) -> bool:
    """Whether the adapter that is saved has been evaluated."""
    step, best = trainer.state.global_step, trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best and Path(best).name != f"checkpoint-{step}":
        return False
    return any(row["step"] == step and "eval_loss" in row for row in read_metrics(metrics))


def make_record(request: TrainRequest, args: Any, config: CELoraConfig, attached: AttachReport) -> dict[str, Any]:
    """The content of run.json when a run begins.

    Args:
        args: the SFTConfig.
        config: what is attached. Presets `auto` and `fast` measure first; `request.config` is what they begin with.
        attached: the report of `attach`.
    """
    return {
        "celora": celora.__version__,
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "given": recorded(request.given),
        "preset": request.preset,
        "config": request.config.to_dict(),  # what was asked for; a resumed run is compared with it
        "settled": config.to_dict(),
        "r": request.r,
        "processes": processes(),
        "lora": request.lora,
        # `to_dict` hides every name that ends in _token, and these two are not secrets.
        "train": args.to_dict() | {name: request.train.get(name) for name in ("eos_token", "pad_token")},
        "estimated_layers": len(attached.estimated),
        "layers": [asdict(layer) for layer in attached.layers],
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
        "machine": {"device": device_name(args.device), "type": args.device.type, "threads": torch.get_num_threads()},
    }


def summarise(trainer: Any, metrics: MetricsWriter, attached: Any) -> dict[str, Any]:
    """Numbers of the whole run, over all resumptions. Only the parts of the wall-clock are of this call alone."""
    rows = read_metrics(metrics.path)
    steps = [row["step_time_ms"] for row in rows if "step_time_ms" in row]
    last: dict[str, Any] = {}
    for row in rows:
        if "eval_loss" in row:
            last = {key: value for key, value in last.items() if key not in _ON_THE_BASE}  # of an earlier evaluation
        last |= {key: row[key] for key in _LAST if key in row}
    return {
        "step": int(trainer.state.global_step),
        "seconds": round(metrics.elapsed(), 3),
        **last,
        "median_step_time_ms": statistics.median(steps) if steps else None,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "estimated_cost": attached.cost,
        **trainer.wall_clock.summary(),
    }


def worst(errors: dict[str, float]) -> dict[str, Any]:
    """The largest relative error that refreshes measured.

    The first refresh of a layer has nothing to compare with, so a short run measures few layers.
    """
    return {"layers_measured": len(errors), "worst_relative_error": max(errors.values(), default=None)}


def of_forwards(errors: dict[str, float], made_exact: Collection[str]) -> dict[str, Any]:
    """The largest error of a forward in 8 bits, and how many became exact. Nothing if no forward was measured."""
    if not errors:
        return {}
    rest = [error for name, error in errors.items() if name not in made_exact]
    return {"worst_forward_error": max(rest, default=None), "forwards_made_exact": len(made_exact)}
