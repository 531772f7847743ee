"""Loads adapters with stock PEFT, in a process that has never seen celora: `stock_load.py FOLDER`.

Every folder in FOLDER has a `base` model, a `batch`, and adapters in `celora` and `plain`. The warnings of each
loading, and the logits, are written to `loaded.pt` beside them.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file

RENAMED = "`is_gradient_checkpointing` is deprecated"  # peft 0.21 asks transformers 5.24 for the old name


class Said(logging.Handler):
    """All warnings of one loading, from `warnings` and from logging."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def load(base: Any, folder: Path) -> Any:
    model = peft.PeftModel.from_pretrained(base, folder)
    if (folder / "second").is_dir():
        model.load_adapter(folder / "second", "second")
        model.base_model.set_adapter(["default", "second"])
    if (folder / "ia3").is_dir():
        config = peft.PeftConfig.from_pretrained(folder / "ia3")
        peft.inject_adapter_in_model(config, model.base_model.model, adapter_name="ia3")
        weights = load_file(folder / "ia3" / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(model, weights, adapter_name="ia3")
    return model


def main() -> None:
    transformers.logging.disable_progress_bar()
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        name = transformers.AutoConfig.from_pretrained(folder / "base").architectures[0]
        batch = torch.load(folder / "batch.pt", weights_only=True)
        found = {}
        for kind in ("celora", "plain"):
            base = getattr(transformers, name).from_pretrained(folder / "base", dtype=torch.float32)
            said = Said()
            # transformers' logger does not pass messages on
            loggers = [logging.getLogger(), logging.getLogger("transformers")]
            for logger in loggers:
                logger.addHandler(said)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = load(base, folder / kind).eval()
            for logger in loggers:
                logger.removeHandler(said)
            messages = said.messages + [str(warning.message) for warning in caught]
            with torch.no_grad():
                logits = model(**batch).logits
            found[kind] = {"said": [text for text in messages if RENAMED not in text], "logits": logits}
        torch.save(found, folder / "loaded.pt")
    assert not any(module.partition(".")[0] == "celora" for module in sys.modules)


if __name__ == "__main__":
    main()
