"""PEFT's own method comparison with celora attached: MetaMathQA and GSM8K, Llama-3.2-3B, LoRA of rank 32.

    python -m benchmarks.peft_comparison ../peft/method_comparison/MetaMathQA --preset exact

This runs PEFT's `run.py` unchanged: its data, its loop, its evaluation, its result file. One thing differs: celora is
attached to the model that `peft.get_peft_model` returns. With `--preset off` nothing differs.

Their loop reads only `outputs.loss` while it trains. It reads `outputs.logits` only in evaluation, without labels. So a
training forward without logits, as the presets have it, is enough.
`run.py` needs a GPU. This was written without one: nothing here has been run on one.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft

import celora
from celora.errors import CELoraError

NAME = "get_peft_model"
PRESETS = ("exact", "auto", "fast", "off")
RESULTS = ("results", "temporary_results", "cancelled_results")  # run.py writes into one of them


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="method_comparison/MetaMathQA of a checkout of PEFT")
    parser.add_argument(
        "experiment", nargs="?", default="lora/llama-3.2-3B-rank32", help="METHOD/NAME (default: %(default)s)"
    )
    parser.add_argument("--preset", choices=PRESETS, default="exact", help="celora's preset (default: %(default)s)")
    args = parser.parse_args(argv)
    folder, experiment = args.folder.resolve(), args.experiment.strip("/").removeprefix("experiments/")
    try:
        check(folder, experiment)
        files = run(folder, experiment, args.preset)
    except CELoraError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    report(files, args.preset)


def check(folder: Path, experiment: str) -> None:
    """Raise a `CELoraError` if run.py would fail at once, would overwrite PEFT's results, or would not use celora."""
    if not (folder / "run.py").is_file():
        raise CELoraError(f"no run.py in {folder}; give the folder method_comparison/MetaMathQA of a checkout of PEFT.")
    if experiment.count("/") != 1 or not (folder / "experiments" / experiment / "adapter_config.json").is_file():
        raise CELoraError(
            f"experiment {experiment!r} has no adapter_config.json; expected METHOD/NAME of a folder in "
            f"{folder / 'experiments'}, such as lora/llama-3.2-3B-rank32."
        )
    if not any(_imports_it(file) for file in folder.glob("*.py")):
        raise CELoraError(
            f"no file in {folder} has 'from peft import {NAME}', so celora cannot attach; use PEFT 0.21.2."
        )
    branch = branch_of_peft()
    if branch in ("", "main"):
        danger = "overwrites PEFT's own results" if branch else "fails without a branch"
        raise CELoraError(
            f"peft is imported from {Path(peft.__file__).parent}, on {branch or 'no'} branch of Git, where run.py "
            f"{danger}; check out a tag of PEFT, or a branch of your own, and install it with pip install -e."
        )


def branch_of_peft() -> str:
    """The Git branch of the installed PEFT, found as run.py finds it; '' if it is in no repository.

    On branch `main`, run.py replaces the published result. Elsewhere it writes a new file with the time in its name.
    """
    command = ["git", "rev-parse", "--abbrev-ref", "HEAD"]
    done = subprocess.run(command, cwd=Path(peft.__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def run(folder: Path, experiment: str, preset: str) -> list[Path]:
    """Run run.py for an experiment, with celora attached unless `preset` is "off". Returns the result files."""
    own, before = peft.get_peft_model, _written(folder)

    @functools.wraps(own)
    def attached(*args: Any, **kwargs: Any) -> Any:
        model = own(*args, **kwargs)
        print(f"celora {celora.__version__}, preset {preset}:", celora.attach(model, preset), sep="\n", flush=True)
        return model

    if preset == "off":
        print("celora is not attached.", flush=True)
    with (
        contextlib.chdir(folder),  # run.py accepts no other path than experiments/METHOD/NAME
        patch.object(sys, "argv", ["run.py", "-v", os.path.join("experiments", *experiment.split("/"))]),
        patch.object(sys, "path", [str(folder), *sys.path]),
        patch.object(peft, NAME, own if preset == "off" else attached),
    ):
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
    return [file for file, time in _written(folder).items() if before.get(file) != time]


def report(files: Sequence[Path], preset: str) -> None:
    """Say where the results lie. Exit with status 1 if there is none, or none of a run that came to its end.

    run.py itself ends with status 0 after an error in training, and writes the error into its result.
    """
    if not files:
        print("run.py wrote no result.", file=sys.stderr)
        raise SystemExit(1)
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        print(f"Preset {preset}: {file}")
        if (status := result["train_info"]["status"]) != "success":
            print(f"run.py's status: {status}. {result['run_info']['error_msg']}", file=sys.stderr)
            raise SystemExit(1)


def _imports_it(file: Path) -> bool:
    """Whether this source has `from peft import get_peft_model`, which takes the name from `peft` when it runs."""
    return any(
        isinstance(node, ast.ImportFrom) and node.module == "peft" and NAME in {alias.name for alias in node.names}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    )


def _written(folder: Path) -> dict[Path, int]:
    """The result files and when they were written, in nanoseconds."""
    return {file: file.stat().st_mtime_ns for name in RESULTS for file in (folder / name).glob("*.json")}


if __name__ == "__main__":
    main()
