"""The table of PEFT variants and models that celora works with. test_variants.py checks every cell.

`python tests/helpers/variants.py` writes docs/use/compatibility.md from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lowest import lowest
from small import made_once, make_base, make_batch

PAGE = Path(__file__).parents[2] / "docs" / "use" / "compatibility.md"

COLUMNS = {
    "estimated": "layers train with estimated gradients, and refresh",
    "same gradient": "with everything kept (`keep_ratio=1`, preset `exact`), PEFT's gradient, to float32 rounding",
    "fused": "presets `exact`, `paper` and `auto` compute adapter and base layer together",
    "reloads": "the saved adapter loads in stock PEFT without a warning, and gives the same outputs",
    "merges": "`merge_adapter` and `unmerge_adapter` between steps work, and training goes on",
    "copies": "`copy.deepcopy` and `torch.save` keep the estimates: copy and original train alike",
    "detaches": "`celora.detach` restores the model, bit for bit",
}
YES = "yes"


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _nothing(model: PeftModel, step: int) -> None:
    """Do nothing between two steps, as most variants."""


@dataclass(frozen=True)
class Variant:
    """One row: how its model is made, and the cells that are not `yes`."""

    name: str
    config: Callable[[], PeftConfig]
    limits: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    base: Callable[[], nn.Module] = make_base
    batch: Callable[[int], dict[str, Tensor]] = make_batch
    prepare: Callable[[PeftModel], Any] = lambda model: None
    optimizer: Callable[[PeftModel], torch.optim.Optimizer] = _adamw
    after_backward: Callable[[PeftModel, int], None] = _nothing
    load: Callable[[nn.Module, Path], PeftModel] = PeftModel.from_pretrained

    def make(self) -> PeftModel:
        """The model, ready to train. The weights are the same every time."""
        model: PeftModel = _make(self)
        return model

    def fit(self, model: PeftModel, steps: int, *, first: int = 0) -> float:
        """Train with a new optimizer, and return the last loss."""
        optimizer = self.optimizer(model)
        loss = torch.zeros(())
        for step in range(first, first + steps):
            torch.manual_seed(step)  # seeds dropout
            loss = model(**self.batch(step)).loss
            loss.backward()
            optimizer.step()
            self.after_backward(model, step)
            optimizer.zero_grad()
        return float(loss.detach())


@made_once
def _make(variant: Variant) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(variant.base(), variant.config())
    variant.prepare(model)
    return model.train()


def _lora(**changes: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": "all-linear", **changes})


def _adalora() -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        init_r=8, target_r=4, tinit=1, tfinal=1, deltaT=1, total_step=30, target_modules=["q_proj", "o_proj", "up_proj"]
    )


def _vera() -> peft.VeraConfig:
    return peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])


def _ia3() -> peft.IA3Config:
    return peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])


def _biased_base() -> nn.Module:
    return make_base(base_bias=True)


_EVA: dict[str, Any] = {}  # what PEFT found; finding it takes half a second


def _eva(model: PeftModel) -> None:
    if not _EVA:
        _EVA.update(peft.get_eva_state_dict(model, [make_batch(100 + i) for i in range(4)], show_progress_bar=False))
    peft.initialize_lora_eva_weights(model, eva_state_dict=dict(_EVA), show_progress_bar=False)


def _allocate(model: PeftModel, step: int) -> None:
    model.base_model.update_and_allocate(step)


def _beside_ia3(model: PeftModel) -> None:
    """Put IA3 on the layers without LoRA."""
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.inject_adapter_in_model(config, model.base_model.model, adapter_name="ia3")
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "ia3_" in name)


def _two_active(model: PeftModel) -> None:
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])


def _load_two(base: nn.Module, folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(base, folder)
    model.load_adapter(folder / "second", "second")
    model.base_model.set_adapter(["default", "second"])
    return model


def _load_beside_ia3(base: nn.Module, folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(base, folder)
    _beside_ia3(model)
    peft.set_peft_model_state_dict(model, load_file(folder / "ia3" / "adapter_model.safetensors"), adapter_name="ia3")
    return model


_NOT_FUSED = {"fused": "PEFT's path"}
_OWN = "computes with a weight of its own"

VARIANTS = (
    Variant("LoRA", _lora()),
    Variant("rsLoRA", _lora(use_rslora=True)),
    Variant("PiSSA", _lora(init_lora_weights="pissa")),
    Variant("OLoRA", _lora(init_lora_weights="olora")),
    Variant(
        "LoftQ", lambda: LoraConfig(r=8, target_modules="all-linear", init_lora_weights="loftq",
                                    loftq_config=peft.LoftQConfig(loftq_bits=4)),
        note="PEFT's own quantiser needs a GPU; tested with a stand-in where there is none",
    ),
    Variant(
        "EVA", lambda: LoraConfig(r=8, target_modules="all-linear", init_lora_weights="eva",
                                  eva_config=peft.EvaConfig(rho=1.0)),
        prepare=_eva, note="attach after `initialize_lora_eva_weights`",
    ),
    Variant("LoRA+", _lora(), optimizer=lambda model: create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0)),
    Variant("LoRA-FA", _lora(), optimizer=lambda model: create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-2)),
    Variant("DoRA", _lora(use_dora=True), _NOT_FUSED),
    Variant("DoRA with dropout", _lora(use_dora=True, lora_dropout=0.1), _NOT_FUSED,
            note="PEFT computes the base layer twice, and only one of the two is estimated"),
    Variant("aLoRA", _lora(alora_invocation_tokens=[7], task_type="CAUSAL_LM"),
            {**_NOT_FUSED, "merges": "not in PEFT either"}, note="padding stays"),
    Variant("`lora_bias=True`", _lora(lora_bias=True), _NOT_FUSED, base=_biased_base),
    Variant("`bias=\"lora_only\"`", _lora(bias="lora_only"), base=_biased_base,
            note="the bias gets its exact gradient"),
    Variant("`modules_to_save`", _lora(modules_to_save=["lm_head"]), note="a trained head computes its own loss"),
    Variant("`layer_replication`", _lora(layer_replication=[[0, 2], [1, 2]]), {"merges": "not in PEFT either"},
            note="padding stays; replicas share their weights, so one merges into all"),
    Variant("`trainable_token_indices`", _lora(trainable_token_indices=[1, 2])),
    Variant("two active adapters", _lora(), _NOT_FUSED, prepare=_two_active, load=_load_two),
    Variant("AdaLoRA", _adalora, _NOT_FUSED, after_backward=_allocate,
            note="the model's own loss, because AdaLoRA adds to it"),
    Variant("VeRA", _vera, _NOT_FUSED),
    Variant("IA3", _ia3, _NOT_FUSED),
    Variant("IA3 beside LoRA", _lora(target_modules=["q_proj", "v_proj", "up_proj"]),
            _NOT_FUSED, prepare=_beside_ia3, load=_load_beside_ia3),
    Variant("LoHa", lambda: peft.LoHaConfig(r=8, target_modules="all-linear"), _NOT_FUSED),
    Variant("LoKr", lambda: peft.LoKrConfig(r=8, target_modules="all-linear"), _NOT_FUSED),
    Variant("OFT", lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules="all-linear",
                                          use_cayley_neumann=False), _NOT_FUSED),
    Variant("MiSS", lambda: peft.MissConfig(r=8, target_modules="all-linear"), _NOT_FUSED),
    Variant("HRA", lambda: peft.HRAConfig(r=8, target_modules="all-linear"),
            {**_NOT_FUSED, "estimated": f"HRA {_OWN}"}),
    Variant("`target_parameters`", lambda: LoraConfig(r=8, target_modules=[], target_parameters=["mlp.up_proj.weight"]),
            {**_NOT_FUSED, "estimated": f"an adapter of a bare parameter {_OWN}"}),
)  # fmt: skip


def _bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    )


def _t5() -> nn.Module:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(d_model=48, d_ff=80, d_kv=12, num_layers=2, num_heads=4, vocab_size=61, decoder_start_token_id=0)
    )


def _qwen3() -> nn.Module:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=12, vocab_size=61, use_cache=False,
        )
    )  # fmt: skip


def _gemma3() -> nn.Module:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=12, vocab_size=61, use_cache=False,
        )
    )  # fmt: skip


def _classes(seed: int) -> dict[str, Tensor]:
    tokens = make_batch(seed)["input_ids"]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}


MODELS = (
    Variant("decoder (Llama)", _lora()),
    Variant("decoder (Qwen3)", _lora(), base=_qwen3),
    Variant("decoder (Gemma 3)", _lora(), base=_gemma3),
    Variant("encoder (BERT, classification)", _lora(task_type="SEQ_CLS"), base=_bert, batch=_classes,
            note="its own loss; the classifier trains beside the adapter"),
    Variant("sequence to sequence (T5)", _lora(task_type="SEQ_2_SEQ_LM"), base=_t5, note="its own loss"),
)  # fmt: skip

# What the newest releases of two programs install: the library has run with these versions.
OTHERS = {
    "library, in axolotl 0.19": {"torch": "2.13.0", "transformers": "5.16.1", "peft": "0.20.0", "safetensors": "0.8.0"},
    "library, in LLaMA-Factory 0.9.5": {
        "torch": "2.13.0", "transformers": "5.6.0", "peft": "0.18.1", "safetensors": "0.8.0",
    },
}  # fmt: skip

# The newest releases that the command line has run with, on Python 3.11 and 3.13.
NEWEST = {"torch": "2.15.0", "transformers": "5.24.0", "peft": "0.21.2", "safetensors": "0.8.0"}


def page() -> str:
    """The text of docs/use/compatibility.md."""
    parts = [
        "# Compatibility",
        "These tables say what works with each variant of PEFT's adapters, and with each kind of model. A test checks "
        "each cell on models of two layers (`tests/whole/test_variants.py`). The columns:",
        "\n".join(f"- **{name}**: {meaning}." for name, meaning in COLUMNS.items()),
        "## PEFT variants",
        _table("variant", VARIANTS),
        "## Models",
        "LoRA on every linear layer. Conv1D layers (GPT-2) and quantised bases have tests of their own.",
        _table("model", MODELS),
        "## Versions",
        "Python 3.11 to 3.13. The library fits into the pins of axolotl 0.19 and LLaMA-Factory 0.9.5. The command line "
        "([`celora[app]`](install.md#from-a-copy-of-the-repository)) needs newer packages. Tried:",
        _versions(),
        f"The command line also needs at least {_others('app')}. Quantised bases need {_others('quantised')}.",
        "`make test` takes the newest releases. Nightly tests take the lowest versions, and the newest pre-releases. "
        "The versions of axolotl and LLaMA-Factory were tried by hand.",
        "## Refused",
        "- **Models patched by Unsloth.** Unsloth's kernels compute base layer and adapter themselves. "
        "`celora.attach` raises `CELoraError`.\n"
        "- **Merged adapters** cannot train. `celora.attach` raises `CELoraError` and says which call undoes it.\n"
        "- **Anything else that bypasses its base layer** is not refused. After the first refresh, a warning names the "
        "kind of layer.",
    ]
    return "\n\n".join(parts) + "\n"


def _others(extra: str) -> str:
    """What an extra needs beside the packages of the library."""
    return ", ".join(f"{name} {version}" for name, version in lowest(extra).items() if name not in lowest())


def _versions() -> str:
    """The versions that the library and the application are tested with."""
    tested = {
        "library, lowest": lowest(),
        **OTHERS,
        "command line, lowest": lowest("app"),
        "command line, newest": NEWEST,
    }
    return _markdown([["", *lowest()], *([name, *map(of.get, lowest())] for name, of in tested.items())])


def _table(what: str, variants: tuple[Variant, ...]) -> str:
    rows = [[what, *COLUMNS, "remarks"]]
    rows += [[v.name, *(v.limits.get(column, YES) for column in COLUMNS), v.note] for v in variants]
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
