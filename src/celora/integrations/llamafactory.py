"""celora in LLaMA-Factory: a launcher in place of `llamafactory-cli`, and a line in the YAML file, `celora: exact`.

    python -m celora.integrations.llamafactory train FILE.yaml [KEY=VALUE ...]

LLaMA-Factory refuses keys that it does not know, so the launcher takes ours out. The rest goes to its `run_exp`, with a
callback for its trainer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from celora.errors import CELoraError
from celora.integrations import default_preset
from celora.integrations.while_training import AttachWhileTraining
from celora.settings.presets import resolve

_COMMAND = "python -m celora.integrations.llamafactory train"


def take_out(arguments: dict[str, Any] | list[str]) -> Any:
    """Remove what the user has written under `celora`, from a file's keys or from flags, and return it.

    Without such a key it is the default preset.
    """
    asked: Any = default_preset()
    if isinstance(arguments, dict):
        return arguments.pop("celora", asked)
    for number, flag in enumerate(arguments):
        name, equals, value = flag.partition("=")
        if name == "--celora":
            if not equals and number + 1 == len(arguments):
                raise CELoraError("--celora without a value; give a preset, for example --celora exact")
            asked = value if equals else arguments.pop(number + 1)
            del arguments[number]
            break
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as `llamafactory-cli train` does, with celora. Returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] != ["train"]:
            raise CELoraError(f"celora is for training; {_COMMAND} FILE.yaml, and llamafactory-cli for all else")
        _train(given[1:])
    except CELoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _train(given: list[str]) -> None:
    try:
        from llamafactory.extras.misc import get_device_count, is_env_enabled, use_ray
        from llamafactory.hparams import read_args
    except ModuleNotFoundError as error:
        if error.name != "llamafactory":
            raise
        raise CELoraError("LLaMA-Factory is not in this environment; pip install llamafactory") from None
    if is_env_enabled("USE_V1"):
        raise CELoraError("USE_V1=1 asks for LLaMA-Factory's new trainer, which has no callbacks; unset it")
    alone = "LOCAL_RANK" not in os.environ and not use_ray()
    if alone and (is_env_enabled("FORCE_TORCHRUN") or get_device_count() > 1):
        count = max(1, get_device_count())
        line = " ".join(["torchrun", "--nproc-per-node", str(count), *_COMMAND.split()[1:], *given])
        raise CELoraError(f"LLaMA-Factory would start several processes, without celora; start them: {line}")
    sys.argv[1:] = given  # where LLaMA-Factory reads them
    read = read_args()
    callback = AttachWhileTraining(take_out(read))
    labelled_head = resolve(callback.config, callback.changes).labelled_head
    if isinstance(read, dict) and read.get("use_asft_loss") and labelled_head:
        raise CELoraError("use_asft_loss reads outputs.logits; give celora: {preset: exact, labelled_head: false}")
    from llamafactory.train.tuner import run_exp

    run_exp(read, callbacks=[callback])


if __name__ == "__main__":
    sys.exit(main())
