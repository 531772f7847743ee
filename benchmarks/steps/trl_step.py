"""A training step of TRL's SFTTrainer: its fused head computes the loss, and its metrics are read from the device.

TRL replaces the model's forward. Its head projects labelled tokens in tiles and never holds all logits, so it is faster
and smaller than Transformers' Trainer around the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celora.machine.device import accelerator
from celora.studies.step import Step, autocasts


class TRLStep(Step):
    """The step of an SFTTrainer, without checkpointing. Attach celora afterwards, as to `trainer.model` elsewhere."""

    def __init__(self, model: Any, folder: Path, *, liger: bool = False) -> None:
        """`liger`: with Liger's kernels, which change Transformers for the whole process."""
        self._liger = liger
        super().__init__(model, folder)
        if liger:  # Trainer does this at the beginning of `train`, which a step does not call
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(model, self.trainer.args.liger_kernel_config)  # TRL's choice: all but its own head

    def make_trainer(self, folder: Path) -> Any:
        """An SFTTrainer. It needs a row and a tokenizer, and neither is used."""
        from datasets import Dataset  # TRL's packages are no part of celora's library
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer

        class Silent(SFTTrainer):  # type: ignore[misc]
            def _send_telemetry(self) -> None:
                pass

        words = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
        arguments = SFTConfig(
            str(folder),
            report_to="none",
            use_cpu=accelerator() is None,
            bf16=autocasts(self.model),
            gradient_checkpointing=False,
            use_liger_kernel=self._liger,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        return Silent(
            self.model,
            arguments,
            train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="word", eos_token="word"),
        )
