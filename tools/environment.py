"""Make the environment that celora runs in: `python tools/environment.py FOLDER [EXTRA ...]`, as the Makefile does.

It installs celora from this checkout, with the extras that are named or else `app`, and torch's CPU build where nothing
else is of use. Only the standard library is imported, since nothing is installed yet. pip's output is shown if pip
fails.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_PATIENCE_S = 5.0
# Extra -> what it is for, as a newcomer would say it, and how long pip usually takes with a good connection.
PURPOSES = {
    "app": ("celora with torch, Transformers, PEFT and TRL", "1 to 4 minutes, about 1.5 GB on disk"),
    "dev": ("what the tests need", "1 to 3 minutes, about 1.4 GB on disk"),
    "docs": ("what the documentation needs", "half a minute"),
}


def say(line: str) -> None:
    print(f"celora: {line}", flush=True)


def has_card() -> bool:
    """Whether an NVIDIA card, or its driver, is to be seen."""
    return shutil.which("nvidia-smi") is not None or bool(glob.glob("/dev/nvidia[0-9]*"))


def names_an_index(configuration: str) -> bool:
    """Whether `pip config list` says where packages come from. Then pip is to look nowhere else."""
    names = (line.partition("=")[0] for line in configuration.splitlines())
    return any(name.rpartition(".")[2] in ("index-url", "extra-index-url", "no-index") for name in names)


def reachable(url: str) -> bool:
    """Whether a page answers within a few seconds."""
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE_S):
            return True
    except OSError:
        return False


def index_of_torch(configuration: str) -> tuple[str | None, str]:
    """The index to take torch from, None for pip's own, and a line that says which and why."""
    if platform.system() != "Linux":
        return None, "torch comes from pip's usual index"
    if has_card():
        return None, "torch comes from pip's usual index, with CUDA: there is an NVIDIA card"
    if names_an_index(configuration):
        return None, "torch comes from the index that pip is configured with"
    if not reachable(f"{CPU_INDEX}/torch/"):
        return (
            None,
            "torch comes from pip's usual index: there is no NVIDIA card, but no answer from download.pytorch.org",
        )
    return CPU_INDEX, "torch is its CPU build from download.pytorch.org: there is no NVIDIA card"


def requirement(name: str) -> str:
    """What pyproject.toml asks of a package, like `torch>=2.11`."""
    import tomllib  # here: a Python that lacks it is to be told, in `main`, which one is needed

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(text for text in project["dependencies"] if re.match(r"[\w.-]+", text)[0] == name)


def pip(python: Path, *arguments: str) -> str:
    """What pip prints; its output is shown, and the program ends, where it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        print(done.stdout, done.stderr, sep="", file=sys.stderr)
        sys.exit(f"celora: pip {' '.join(arguments)} failed; its own words stand above.")
    return done.stdout


def install(folder: Path, extras: list[str]) -> None:
    """Make `folder` a virtual environment, if it is none yet, and install into it."""
    begun = time.perf_counter()
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        say(f"making the environment {folder} with Python {platform.python_version()}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for extra in extras or ["app"]:
        what, usually = PURPOSES.get(extra, (f"the extra {extra}", "minutes"))
        say(f"installing {what} into {folder}; this usually takes {usually} ...")
    if not extras:  # which are added to what is there
        index, why = index_of_torch(pip(python, "config", "list"))
        say(why)
        if index is not None:  # without what torch needs: that comes from pip's usual index, like everything else
            pip(python, "install", "--no-deps", "--index-url", index, requirement("torch"))
    pip(python, "install", "--editable", f"{ROOT}[{','.join(extras or ['app'])}]")
    say(f"installed in {(time.perf_counter() - begun) / 60:.1f} minutes")


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  whoever runs this may have an older one
        sys.exit(f"celora needs Python 3.11 or newer; this is {platform.python_version()}. Try: make PYTHON=python3.12")
    install(Path(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    main()
