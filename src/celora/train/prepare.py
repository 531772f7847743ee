"""What `celora audit` and `celora estimate` share: they build the trainer of a request, and do not train it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import celora
from celora.runtime.state import saved_config
from celora.settings.config import CELoraConfig
from celora.train.choose import settled
from celora.train.dtype import settle_dtype
from celora.train.loading import (
    check_modules,
    load_adapter,
    load_model,
    load_tokenizer,
    lora_config,
    quiet_libraries,
    training_rows,
    with_folder,
)
from celora.train.output.folder import CONFIG
from celora.train.request.arguments import TrainRequest, sft_config
from celora.train.rows.places import local_files
from celora.train.trainer import build_trainer, check_tokens, refused
from celora.train.use.trained import tokenizer_of

# Audit and estimate evaluate, save and send nothing, whatever a settings file written for training says.
MEASURES_ONLY = {
    "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False, "save_strategy": "no",
    "push_to_hub": False, "report_to": "none",
}  # fmt: skip


def audit_model(
    request: TrainRequest,
    *,
    rows: int | None,
    adapter: Path | None = None,
    reference: Literal["float32"] | None = None,
) -> Any:
    """`celora.audit` of a new adapter, or of the one in `adapter`. It sees the first batch of training."""
    with prepared(request, rows, adapter) as (trainer, config), refused("audit"):
        if request.preset in ("auto", "fast") and config is request.config:
            config = settled(request, trainer).config
        celora.attach(trainer.model, config)
        batch = next(iter(trainer.get_train_dataloader()))
        return celora.audit(trainer.model, batch, reference=reference)


@contextmanager
def prepared(request: TrainRequest, rows: int | None, adapter: Path | None) -> Iterator[tuple[Any, CELoraConfig]]:
    """The trainer of this request, and the configuration to attach to its model. Writes no output.

    `rows`: rows in a batch; None for as many as in training.
    """
    with quiet_libraries(), tempfile.TemporaryDirectory() as scratch:
        local_files(request.data, request.options.dataset_train_split)  # a mistake is told before a model is converted
        request = with_folder(request)
        tokenizer = load_tokenizer(request) if adapter is None else tokenizer_of(adapter, request)
        data = training_rows(request, tokenizer)
        train = request.train | MEASURES_ONLY | ({} if rows is None else {"per_device_train_batch_size": rows})
        args = sft_config(replace(request, train=train, output=Path(scratch)))
        request, _ = settle_dtype(request, args)
        model, peft, config = load_model(request), lora_config(request), request.config
        check_modules(request, model)
        if adapter is not None:
            model, peft = load_adapter(model, adapter), None
            if request.options.preset is None and request.options.celora is None:  # take what it was trained with
                # A checkpoint has it in celora's state.
                own = CELoraConfig.load(adapter) if (adapter / CONFIG).is_file() else saved_config(adapter)
                config = own or config
        trainer = build_trainer(request, args, model, tokenizer, data, peft=peft)
        check_tokens(trainer, request)
        yield trainer, config
