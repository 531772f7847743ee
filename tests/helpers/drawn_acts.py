"""Actions of users on a model, before or while it trains: `ACTS[name](model, k)` acts on part `k` of its kind."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.loss.loss_utils import ForCausalLMLoss

from drawn_models import blocks_of, causal_of, named, tuners_of


def times(value: Any, factor: float) -> Any:
    """Multiply a layer's output, or the first of its outputs."""
    if isinstance(value, tuple):
        return (times(value[0], factor), *value[1:])
    return value * factor if isinstance(value, Tensor) else value


class Scaled(nn.Module):
    """A parametrisation that halves a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def one_of(parts: list[Any], k: int) -> Any:
    """The k-th part, counted round and round; None if there are no parts."""
    return parts[k % len(parts)] if parts else None


def patch(module: nn.Module | None, factor: float = 0.5) -> None:
    """Replace the forward of this one module by one that multiplies its output."""
    if module is not None:
        own = module.forward

        @functools.wraps(own)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return times(own(*args, **kwargs), factor)

        module.forward = patched  # type: ignore[method-assign]


def hook(module: nn.Module | None, factor: float | None = 0.5) -> None:
    """Add a forward hook that multiplies the output, or only looks at it."""
    if module is not None:
        module.register_forward_hook(lambda m, args, output: None if factor is None else times(output, factor))


def pre_hook(module: nn.Module | None) -> None:
    """Add a forward pre-hook that multiplies a module's first positional input."""
    if module is not None:
        module.register_forward_pre_hook(lambda m, args: (args[0] * 0.5, *args[1:]) if args else None)


def backward_hook(module: nn.Module | None) -> None:
    """Add a backward hook that changes the gradient of a module's input."""
    if module is not None:
        module.register_full_backward_hook(lambda m, grads, _: tuple(g if g is None else g * 0.5 for g in grads))


def pruned(module: nn.Module | None) -> None:
    """Replace a forward by one that multiplies with a masked weight, as pruning does."""
    if module is not None and isinstance(module, nn.Linear):
        mask = (torch.arange(module.weight.numel()).view_as(module.weight) % 3 > 0).to(module.weight.dtype)
        module.forward = lambda x: nn.functional.linear(x, module.weight * mask.to(x.dtype), module.bias)  # type: ignore[method-assign]


def base(model: nn.Module, k: int) -> Any:
    layer = one_of(tuners_of(model), k)
    return None if layer is None else layer.get_base_layer()


def head(model: nn.Module, k: int) -> Any:
    return causal_of(model).get_output_embeddings()


def norm(model: nn.Module, k: int) -> Any:
    return one_of(named(model, "RMSNorm", "LayerNorm"), k)


def activation(model: nn.Module, k: int) -> Any:
    return one_of([m.act_fn for m in model.modules() if isinstance(getattr(m, "act_fn", None), nn.Module)], k)


def matrix(model: nn.Module, k: int) -> Any:
    """A or B of an adapter."""
    layer = one_of(tuners_of(model), k)
    both = None if layer is None else (layer.lora_A if k % 2 else layer.lora_B)
    return None if not both else next(iter(both.values()))


def block(model: nn.Module, k: int) -> Any:
    return one_of(blocks_of(model), k)


PARTS: dict[str, Callable[[nn.Module, int], Any]] = {
    "base": base,
    "head": head,
    "block": block,
    "attention": lambda model, k: one_of(named(model, "Attention"), k),
    "mlp": lambda model, k: one_of(named(model, "MLP"), k),
    "norm": norm,
    "activation": activation,
    "decoder": lambda model, k: causal_of(model).base_model,
    "embedding": lambda model, k: causal_of(model).get_input_embeddings(),
    "adapter": lambda model, k: one_of(tuners_of(model), k),
    "matrix": matrix,
}


def on(do: Callable[..., None], part: str, *more: Any) -> Callable[[PeftModel, int], None]:
    return lambda model, k: do(PARTS[part](model, k), *more)


def train_parameter(module: nn.Module | None) -> None:
    """Let a frozen weight train."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        weight.requires_grad_(True)


def freeze(module: nn.Module | None) -> None:
    for p in () if module is None else module.parameters():
        p.requires_grad_(False)


@torch.no_grad()
def change_weight(module: nn.Module | None) -> None:
    """Change a weight in place, as loading a state dict does."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        weight.mul_(0.5)


def replace_weight(module: nn.Module | None) -> None:
    """Replace a weight by another parameter of half the size."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        module.weight = nn.Parameter(weight.detach() * 0.5, requires_grad=False)  # type: ignore[union-attr]


def parametrise(module: nn.Module | None) -> None:
    if isinstance(module, nn.Linear) and not parametrize.is_parametrized(module):
        parametrize.register_parametrization(module, "weight", Scaled())


def replace_base(model: PeftModel, k: int) -> None:
    """Replace a base layer by a copy with another weight, as quantisers do."""
    layer = one_of(tuners_of(model), k)
    if layer is not None:
        layer.base_layer = copy.copy(layer.base_layer)
        layer.base_layer._parameters = dict(layer.base_layer._parameters)
        replace_weight(layer.base_layer)


def replace_head(model: PeftModel, k: int) -> None:
    causal = causal_of(model)
    old = causal.get_output_embeddings()
    if type(old) is nn.Linear:
        new = nn.Linear(old.in_features, old.out_features, bias=k % 2 == 1, dtype=old.weight.dtype).requires_grad_(
            False
        )
        with torch.no_grad():
            new.weight.copy_(old.weight.flip(0))
            if new.bias is not None:
                new.bias.copy_(torch.linspace(-1, 1, old.out_features))
        causal.set_output_embeddings(new)


def replace_loss(model: PeftModel, k: int) -> None:
    causal_of(model).loss_function = lambda *args, **kwargs: 2 * ForCausalLMLoss(*args, **kwargs)


def patch_model(model: PeftModel, k: int) -> None:
    """Replace the whole model's forward, as accelerate, TRL and users do. The new one adds a penalty to the loss."""
    causal = causal_of(model)
    own = causal.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if not isinstance(output, tuple) and output.loss is not None:
            output.loss = output.loss * 1.5
        return output

    causal.forward = [functools.wraps(own)(forward), functools.partial(forward)][k % 2]  # type: ignore[method-assign]


def hook_model(model: PeftModel, k: int) -> None:
    """Hook the whole model; the hook changes the loss."""

    def changed(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple) and output.loss is not None:
            output.loss = output.loss * 1.5
        return output

    causal_of(model).register_forward_hook(changed)


def configure(**values: Any) -> Callable[[PeftModel, int], None]:
    def set_values(model: PeftModel, k: int) -> None:
        causal = causal_of(model)
        for config in (causal.config, causal.config.get_text_config()):
            for name, value in values.items():
                if hasattr(config, name) or name == "is_causal":
                    setattr(config, name, value)

    return set_values


def share(model: PeftModel, k: int) -> None:
    """Let the second block use the first block's layers, so they run twice in a forward."""
    inner = [{name: m for name, m in part.named_children() if named(m, "MLP")} for part in blocks_of(model)]
    if len(inner) > 1 and inner[0] and inner[0].keys() == inner[1].keys():
        for name, part in inner[0].items():
            setattr(blocks_of(model)[1], name, part)


def forget_adapter(model: PeftModel, k: int) -> None:
    """Remove an adapter, and add one with the same name and another rank."""
    targets, bias = adapted(model), model.peft_config["default"].bias
    model.add_adapter("kept", LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.set_adapter("kept")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=3, target_modules=targets, init_lora_weights=False, bias=bias))
    model.set_adapter("default")


def interrupt(model: PeftModel, k: int) -> None:
    """Run a training call that fails inside one of its blocks."""

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    part = block(model, k)
    handle = part.register_forward_pre_hook(fail)
    with contextlib.suppress(KeyboardInterrupt):
        tokens = torch.arange(3, 9)[None]
        model(input_ids=tokens, labels=tokens)
    handle.remove()


def with_second(model: PeftModel, k: int) -> None:
    model.add_adapter("late", LoraConfig(r=2, target_modules=adapted(model), init_lora_weights=False))
    if k % 2:
        model.set_adapter("late")


def adapted(model: PeftModel) -> Any:
    return model.peft_config["default"].target_modules


def merge_and_back(model: PeftModel, k: int) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def causal_attention(value: bool) -> Callable[[PeftModel, int], None]:
    """Let tokens attend to later ones, as LLM2Vec and diffusion training do."""

    def set_modules(model: PeftModel, k: int) -> None:
        for module in named(model, "Attention"):
            if isinstance(getattr(module, "is_causal", None), bool):
                module.is_causal = value  # type: ignore[assignment]

    return set_modules


def scale_adapter(model: PeftModel, k: int) -> None:
    for layer in tuners_of(model):
        for name in layer.lora_A:
            layer.scale_layer(3.0) if k % 2 else layer.set_scale(name, 0.5)


def checkpoint_model(reentrant: bool) -> Callable[[PeftModel, int], None]:
    def enable(model: PeftModel, k: int) -> None:
        causal_of(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant or k % 2:
            model.enable_input_require_grads()

    return enable


ACTS: dict[str, Callable[[PeftModel, int], None]] = {
    "look at base": on(hook, "base", None),
    "look at block": on(hook, "block", None),
    **{f"patch {part}": on(patch, part) for part in PARTS},
    **{f"hook {part}": on(hook, part) for part in PARTS},
    **{f"pre-hook {part}": on(pre_hook, part) for part in PARTS},
    **{f"backward hook {part}": on(backward_hook, part) for part in ("base", "matrix", "norm", "activation", "block")},
    **{f"train {part}": on(train_parameter, part) for part in ("base", "head", "norm", "embedding")},
    **{f"change {part}": on(change_weight, part) for part in ("base", "head", "norm", "matrix")},
    **{f"replace weight of {part}": on(replace_weight, part) for part in ("base", "head", "norm")},
    **{f"parametrise {part}": on(parametrise, part) for part in ("base", "head", "matrix")},
    **{f"freeze {part}": on(freeze, part) for part in ("adapter", "matrix")},
    "prune base": on(pruned, "base"),
    "prune head": on(pruned, "head"),
    "replace base": replace_base,
    "replace head": replace_head,
    "replace loss": replace_loss,
    "patch model": patch_model,
    "hook model": hook_model,
    "config is_causal": configure(is_causal=False),
    "module is_causal": causal_attention(False),
    "config use_cache": configure(use_cache=True),
    "config hidden states": configure(output_hidden_states=True),
    "config return_dict": configure(return_dict=False),
    "config scale": configure(logit_scale=2.0, logits_scaling=3.0),
    "config cap": configure(final_logit_softcapping=2.0, logits_soft_cap=2.0),
    "config experts": configure(output_router_logits=True),
    "eager": lambda model, k: causal_of(model).set_attn_implementation("eager"),
    "input gradients": lambda model, k: model.enable_input_require_grads(),
    "checkpoint": checkpoint_model(False),
    "checkpoint, re-entrant": checkpoint_model(True),
    "interrupt": interrupt,
    "share": share,
    "forget adapter": forget_adapter,
    "another adapter": with_second,
    "merge and back": merge_and_back,
    "scale adapter": scale_adapter,
    "evaluation mode": lambda model, k: model.eval() and None,
    "block in evaluation mode": lambda model, k: block(model, k).eval() and None,
}
