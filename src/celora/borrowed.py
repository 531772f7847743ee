"""The list of other libraries' private names that celora uses. Each is looked up when it is used.

A private name may move or disappear in any release. Then `borrow` returns None, and warns once what celora does not do
without it. The caller takes the plain path, which gives the same result more slowly. So a new version of a library can
cost time, but it cannot change a result or break `import celora`. celora uses no private name of a module or class that
is not listed here. What objects keep in attributes of their own is read where it is needed.
"""

from __future__ import annotations

import functools
import warnings
from importlib import import_module
from typing import Any

_UNDER_MODES = "while a mode looks at every operator, nothing is fused or computed in one pass"
# "module:name" or "module:Class.attribute" -> what celora does not do if the library lacks it.
NAMES: dict[str, str] = {
    # Methods of the trainer that `celora train` overrides. If one is gone, our override is never called.
    "transformers:Trainer._determine_best_metric": "a metric that no evaluation has is told in transformers' own words",
    "transformers:Trainer._get_output_dir": "the checkpoints of a hyperparameter search are without celora's state",
    "transformers:Trainer._get_train_sampler": "rows that are grouped by length come in another order once a run is "
    "resumed in a later epoch",
    "transformers:Trainer._load_best_model": "a run that was stopped after its last step is not finished from its best "
    "checkpoint",
    "transformers:Trainer._load_from_checkpoint": "a run that was stopped after its last step is not finished from its "
    "checkpoint",
    "transformers:Trainer._save": "training_args.bin stays beside the adapter",
    "transformers:Trainer._save_checkpoint": "an older checkpoint is removed before the new one is sealed",
    "trl:SFTTrainer._prepare_dataset": "neither a row that the chat template refuses nor rows that are cut are named",
    "trl:SFTTrainer._send_telemetry": "TRL may tell the hub that a trainer was made (HF_HUB_DISABLE_TELEMETRY=1 stops "
    "that)",
    "torch:_int_mm": "8-bit products are those of celora's own kernels only",
    "torch:_scaled_mm": "there are no fp8 products",
    "torch._dynamo:mark_static_address": "CUDA graphs copy 8-bit weights at each replay",
    "torch.cpu:_init_amx": "AMX is counted on where the CPU has it, also if an old Linux forbids it",
    "torch:cuda._sleep": "times of short products on a GPU may be those of their launches",
    "torch:ops.mkldnn._linear_pointwise": "float32 products are MKL's, which is slow on AMD's Zen 5",
    "torch:ops.onednn.qlinear_pointwise": "8-bit products without celora's own kernels are slower",
    "torch:ops.onednn.qlinear_prepack": "8-bit products without celora's own kernels are slower",
    "torch._subclasses.fake_tensor:FakeTensor": "a tool that computes shapes may stop where celora reads a number",
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass": "the memory of quantised and sharded tensors is not "
    "counted exactly",
    "transformers.loss.loss_utils:ForCausalLMLoss": "the loss is the model's own, with padding",
    "transformers:PretrainedConfig._attn_implementation": "padding stays in batches",
    "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS": "nobody checks who makes attention masks",
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS": "an attention that stands in it alone is not seen",
    "transformers.integrations.gguf.gguf_tokenizer_mapping:GGUF_PRE_TOKENIZER_SPLITS": "nobody checks whether the text "
    "of a GGUF file's tokenizer is split as the file says",
    "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse": "4-bit layers that evaluation on CPU has packed "
    "anew stay exact",
    "torch.nn.modules.module:_global_forward_hooks": "no layer is estimated or fused",
    "torch.nn.modules.module:_global_forward_pre_hooks": "no layer is estimated or fused",
    "torch.nn.modules.module:_global_backward_hooks": "gates are not computed in one pass",
    "torch.nn.modules.module:_global_backward_pre_hooks": "gates are not computed in one pass",
    "torch.utils._python_dispatch:_disable_current_modes": "a layer that first runs under a mode that looks at "
    "every operator keeps PEFT's own backward that time",
    "torch.utils._python_dispatch:_get_current_dispatch_mode_stack": _UNDER_MODES,
    "torch.utils.checkpoint:_CachedTorchDispatchMode": _UNDER_MODES,
    "torch.utils.checkpoint:_CachingTorchDispatchMode": _UNDER_MODES,
    "torch.utils._python_dispatch:is_in_torch_dispatch_mode": "adapters are not fused with their layers, norms, "
    "gates and rotations are not computed in one pass, and attention is torch's own",
}


_found: dict[str, Any] = {}


def borrow(name: str) -> Any:
    """The object that `NAMES` lists as `name`, or None if the installed version of its library lacks it."""
    if name not in _found:  # not `functools.cache`, which torch.compile traces through, and warns of
        _found[name] = _look_up(name)
    if _found[name] is None:
        _say_missing(name)
    return _found[name]


def _look_up(name: str) -> Any:
    assert name in NAMES, f"{name} is not listed"
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


@functools.cache
def _say_missing(name: str) -> None:
    library = name.partition(":")[0].partition(".")[0]
    warnings.warn(f"celora: this version of {library} has no {name.replace(':', '.')}, so {NAMES[name]}.", stacklevel=3)


def forget() -> None:
    """Forget what was looked up and what was said. For tests that take names away."""
    _found.clear()
    _say_missing.cache_clear()
