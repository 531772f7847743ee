"""Run a script of others, with celora attached to every PEFT model that a Trainer trains: `python -m celora.run`.

The script stays unchanged. It sees its arguments, `__main__` and `sys.path` as if Python had started it. Nothing large
is imported before the script: it may set environment variables first, and import libraries in its own order. When it
imports Transformers' Trainer, a callback joins those that every Trainer has by default.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any

from celora.errors import CELoraError, choose
from celora.integrations import default_preset
from celora.settings.names import PRESET_NAMES

if TYPE_CHECKING:
    from celora.integrations.while_training import AttachWhileTraining

USAGE = """usage: python -m celora.run [--preset PRESET] [--SETTING VALUE ...] SCRIPT [ARGUMENTS ...]
       python -m celora.run [--preset PRESET] [--SETTING VALUE ...] -m MODULE [ARGUMENTS ...]

Run a script, with celora attached to every PEFT model that a Transformers or TRL Trainer trains.

  --preset PRESET    exact, auto, fast, paper or off; without it, the variable CELORA_PRESET, or else exact
  --SETTING VALUE    a setting of celora that concerns all layers: --labelled_head false keeps outputs.logits

With several processes: torchrun -m celora.run SCRIPT, accelerate launch -m celora.run SCRIPT."""

_TRAINER = "transformers.trainer"


@dataclass
class _Asked:
    """What the options before the script say."""

    settings: dict[str, Any] = field(default_factory=dict)
    module: bool = False
    arguments: list[str] = field(default_factory=list)  # the script or module, and its own arguments


def _parse(given: Sequence[str]) -> _Asked:
    asked, rest = _Asked({"preset": default_preset()}), list(given)
    while rest and rest[0].startswith("-"):
        option, equals, value = rest.pop(0).partition("=")
        if option == "-m":
            asked.module = True
            break
        if not equals and not rest:
            raise CELoraError(f"{option} without a value; give one, and then the script")
        value = value if equals else rest.pop(0)
        asked.settings[option.lstrip("-").replace("-", "_")] = _plain(value)
    if not rest:
        raise CELoraError("no script to run; python -m celora.run [--preset exact] train.py ARGUMENTS")
    asked.settings["preset"] = choose("preset", str(asked.settings["preset"]), PRESET_NAMES)
    asked.arguments = rest
    return asked


def _plain(value: str) -> Any:
    """`false`, `50` or `0.1` as what it is; anything else as text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


class _AfterImport(MetaPathFinder):
    """Call `then` with the module once it is imported, by whomever. It finds nothing else."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self.module else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _attach_to_every_trainer(settings: dict[str, Any]) -> list[AttachWhileTraining]:
    """Give every Trainer of this process a callback. Returns the list of them, which grows as trainers are made."""
    made: list[AttachWhileTraining] = []

    class Attach:  # a Trainer calls each class among its default callbacks
        def __new__(cls) -> Any:
            from celora.integrations.while_training import AttachWhileTraining

            made.append(AttachWhileTraining(settings))
            return made[-1]

    def join(trainer: ModuleType) -> None:
        if not isinstance(getattr(trainer, "DEFAULT_CALLBACKS", None), list):
            raise CELoraError(
                "this version of transformers gives its trainers no list of default callbacks, which celora.run joins; "
                "call celora.attach(trainer.model, 'exact') in the script"
            )
        trainer.DEFAULT_CALLBACKS.append(Attach)

    if _TRAINER in sys.modules:
        join(sys.modules[_TRAINER])
    else:
        sys.meta_path.insert(0, _AfterImport(_TRAINER, join))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script as the options say, and return its exit status. A script that exits raises its own `SystemExit`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    made: list[AttachWhileTraining] = []
    try:
        asked = _parse(given)
        made = _attach_to_every_trainer(asked.settings)
        _run(asked)
    except CELoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as ended:
        if not ended.code:
            _remind(made)
        raise
    _remind(made)
    return 0


def _run(asked: _Asked) -> None:
    sys.argv[:] = asked.arguments
    name = asked.arguments[0]
    if asked.module:
        if not _is_module(name):
            raise CELoraError(f"no module {name!r} in this environment; give the name of one, or a script without -m")
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(name):
        raise CELoraError(f"no script {name!r}; give a file, or -m and the name of a module")
    path = os.path.abspath(name)
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    # As Python does it, and it stays: `runpy.run_path` would take the module away when the script ends.
    main = ModuleType("__main__")
    loader = SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __loader__=loader, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = main
    exec(compile(loader.get_data(path), path, "exec", dont_inherit=True), main.__dict__)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


def _remind(made: Sequence[AttachWhileTraining]) -> None:
    """Say it if celora had nothing to do: the first process alone says it."""
    if not made and os.environ.get("RANK", "0") == "0":
        print("celora: no Trainer of Transformers or TRL was made, so celora did nothing.", file=sys.stderr)
