"""What `celora sft` starts in each process: TRL's script under `celora.run`. What a library refuses becomes one line.

TRL tells bad input by an exception. Until the first step, `celora train` takes such an exception for bad input, and so
does this file. `trl sft` with the same arguments still shows the traceback. Exceptions of celora's own code, and those
after the first step, pass with their traceback.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

from celora.errors import CELoraError
from celora.integrations.script import main


def guarded() -> int:
    """Run what the command line names, as `celora.run` does, and return the exit status: 2 for bad input."""
    try:
        return main()
    except Exception as error:
        from celora.train.processes import speaks  # now that the script has imported what it needs in its own order
        from celora.train.trainer import refused

        try:
            with refused("training", trainer_in(error)):
                raise
        except CELoraError as said:
            if speaks():
                print(f"error: {said} (`trl sft` with the same arguments shows the traceback)", file=sys.stderr)
            return 2


def trainer_in(error: BaseException) -> Any:
    """The Trainer whose training raised this error; None if it was raised before a training."""
    from transformers import Trainer

    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "train")
    callers = (frame.f_locals.get("self") for frame in frames)
    return next((caller for caller in callers if isinstance(caller, Trainer)), None)


if __name__ == "__main__":
    sys.exit(guarded())
