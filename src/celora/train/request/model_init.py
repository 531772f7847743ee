"""`model_init_kwargs`: which of Transformers' settings of a model are taken, and which have a name of their own."""

from __future__ import annotations

from typing import Any

from celora.errors import CELoraError, unknown
from celora.train.request.fields import REFUSED, convert, known_fields

# Names in model_init_kwargs that say how to load. Reading tensor by tensor (--base int8) refuses them.
LOADING = frozenset({
    "device_map", "max_memory", "low_cpu_mem_usage", "disable_mmap", "local_files_only", "force_download", "variant",
})  # fmt: skip
# Names allowed there: settings of the model, and where it is loaded to. Other names would unpickle weights, run kernels
# or code from the hub, send requests, write files elsewhere, or have no effect.
_ALLOWED = LOADING | frozenset({
    "use_cache", "attention_dropout", "sliding_window", "max_position_embeddings", "rope_scaling", "rope_parameters",
    "rope_theta", "experts_implementation", "output_router_logits", "router_aux_loss_coef",
})  # fmt: skip
# Also allowed there: another way to write the name on the right.
_ALIASES = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
}


def with_own_names(values: dict[str, Any]) -> dict[str, Any]:
    """Move settings out of model_init_kwargs that have a name of their own (`torch_dtype` is `dtype`).

    Raises CELoraError for a name that is not allowed there.
    """
    known, init = known_fields(), values.get("model_init_kwargs") or {}
    moved: dict[str, Any] = {}
    for key, value in init.items():
        if key in REFUSED:
            raise CELoraError(f"{key} in model_init_kwargs is refused: {REFUSED[key][1]}")
        if name := _ALIASES.get(key):
            moved[name] = convert(known[name], value)
            if values.get(name, moved[name]) != moved[name]:
                raise CELoraError(
                    f"{key}={value!r} in model_init_kwargs, but {name}={values[name]!r}; give one of them"
                )
        elif key not in _ALLOWED:
            raise unknown("name in model_init_kwargs", key, _ALLOWED | set(_ALIASES))
    rest = {key: value for key, value in init.items() if key in _ALLOWED}
    return values | moved | ({"model_init_kwargs": rest} if init else {})
