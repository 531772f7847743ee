"""How long does `celora compare` take on the demo's data, and what does it say? Three seeds of LoRA, `paper`, `auto`.

`python -m benchmarks.learning.compare_demo --work FOLDER` runs `celora compare` in a process of its own. It writes
`compare-demo.jsonl`: the outcomes, and the wall-clock minutes of everything, with plans and evaluations. After a kill,
the same command continues. But the time is unknown then, so no row is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from subprocess import run

from benchmarks import rows
from celora.machine.timing import faster_dtype
from celora.studies import demo
from celora.studies.assets import demo_model
from celora.studies.sentiment import splits, to_rows

RESULTS = Path(__file__).with_name("compare-demo.jsonl")
STEPS = 80  # nine runs in less than 25 minutes; the demo had 120 steps when the rows were made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data and the comparison")
    work: Path = parser.parse_args().work
    output = work / "compared"
    begun = output.exists()
    drawn = splits(0, train=120 * 8, validation=600, test=600)  # as the demo of that time drew them
    dtype = faster_dtype()
    for name, reviews in (("train", drawn.train), ("test", drawn.test)):
        rows.write(work / f"{name}.jsonl", to_rows(reviews))
    settings = {
        "model": demo_model(),
        "data": work / "train.jsonl",
        "eval_data": work / "test.jsonl",
        "output": output,
        "dtype": dtype,
        "max_steps": STEPS,
        "learning_rate": demo.LEARNING_RATES["LoRA"],
    }
    start = time.monotonic()
    flags = [f"--{name}={value}" for name, value in settings.items()]
    run([sys.executable, "-m", "celora", "compare", *flags], check=True)
    minutes = round((time.monotonic() - start) / 60, 2)
    if begun:
        raise SystemExit(f"{output} was begun before, so how long it takes is not known: no rows are written")
    same = {"dtype": dtype, "minutes": minutes, **rows.conditions()}
    rows.write(RESULTS, [outcome | same for outcome in rows.read(output / "compare.jsonl")])
    print(f"{minutes} minutes")


if __name__ == "__main__":
    main()
