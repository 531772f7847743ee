"""Hides messages of other libraries that say nothing about the run.

PEFT and Transformers import bitsandbytes, torchao and DeepSpeed if they are installed, even for models that need none
of them. Some of them then complain about features that the run does not use. The command line hides only the messages
below, by their logger and a few words. `import celora` changes no logging.
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
            # Send it to stderr: DeepSpeed's own handler writes to stdout, which is for results.
            logging.lastResort.handle(record)
            return False
        return True


_LEAVE_OUT = _LeaveOut()


def hush() -> None:
    """Hide these messages in this process from now on."""
    for name in MESSAGES:
        logging.getLogger(name).addFilter(_LEAVE_OUT)
