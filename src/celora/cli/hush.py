"""Messages of other libraries that a command leaves out, since they say nothing about the run.

PEFT and Transformers import bitsandbytes, torchao and DeepSpeed wherever these are installed, also for models that need
none of them. Some then tell what this machine lacks for features that the run does not use. Only the messages below are
left out, each known by its logger and a few words. Only the command line does so: `import celora` changes no logging.
"""

from __future__ import annotations

import logging

# Logger -> words of its message.
MESSAGES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",  # torchao calls it
    "DeepSpeed": "Setting accelerator to CPU.",
}


class _LeaveOut(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if MESSAGES[record.name] in record.getMessage():
            return False
        if record.name == "DeepSpeed" and logging.lastResort is not None:
            logging.lastResort.handle(
                record
            )  # to stderr: DeepSpeed's own handler writes to stdout, which is for results
            return False
        return True


_LEAVE_OUT = _LeaveOut()


def hush() -> None:
    """Leave these messages out of this process's output from now on."""
    for name in MESSAGES:
        logging.getLogger(name).addFilter(_LEAVE_OUT)
