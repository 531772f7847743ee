"""What celora changes about the forward pass of a whole language model, none of which changes a result.

While it trains on labels, padding is left out (`celora.packing`) and the loss is computed over labelled tokens only
(`celora.head`). Hooks do it: the model is given other arguments, told to project no token onto the vocabulary
(`logits_to_keep`), and its output gets the loss. Its classes and its `forward` stay what they are.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from celora import packing
from celora.attention import ATTENTION, register
from celora.errors import CELoraError
from celora.fused import Lender
from celora.graft import LayerGraft, Measured, Mode, Switch
from celora.head import Logits, score_tokens
from celora.passes import Pass
from celora.sharded import is_split, whole
from celora.synchronise import gathers, largest_of_all

IGNORED = -100
_PROBED = 4  # tokens on which the model's own logits are compared with ours
_WORDS = 4096  # at once, in doing so
_TRL = "fused_lm_head"  # TRL's trainers ask for log-probabilities instead of logits
_TRL_FIELDS = {"log_probs", "entropy", "is_top1"}
# Arguments that ask for something which only the model's own head, or a padded batch, can give.
_REFUSED = ("cache", "past_key_values", "logits_to_keep", "shift_labels")
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")  # also in the configuration
_UNPACKED = ("inputs_embeds", "cu_seq_lens_q", "seq_idx")  # arguments beside which a batch is not packed (again)


@dataclass
class ScoredOutput(ModelOutput):  # type: ignore[misc]
    """What TRL expects of a call with `fused_lm_head=True`; per-token fields are (B, T-1), 0 without a label."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class _Spy:
    """Takes the place of a model's loss function for one call, to see whether the model's loss is that function's.

    It answers 1. If the loss is 1, nothing was added to the answer and it was not computed elsewhere; and if the labels
    are those which the model was given, they are shifted by the loss function and not before.
    """

    def __init__(self, model: PreTrainedModel, labels: Tensor) -> None:
        self.labels = labels
        self.asked: list[Tensor | None] = []  # the logits of each question; None for one that it cannot answer
        self._attributes = vars(model)
        self._usual = self._attributes.get("_loss_function")  # None where Transformers looks it up
        self._attributes["_loss_function"] = self

    def __call__(self, logits: Tensor, labels: Any, *args: Any, **kwargs: Any) -> Tensor:
        usual = kwargs.get("ignore_index", IGNORED) == IGNORED and kwargs.get("shift_labels") is None
        same = isinstance(labels, Tensor) and labels.to(self.labels.device).equal(self.labels)
        self.asked.append(logits.detach() if usual and same else None)
        return torch.ones((), device=logits.device)

    def agrees(self, output: Any) -> bool:
        """Whether the model's loss is the answer to one question, about the logits that the model has returned."""
        if len(self.asked) != 1 or self.asked[0] is None or not isinstance(output.logits, Tensor):
            return False
        asked, logits = self.asked[0].float(), output.logits.float()
        same = asked.shape == logits.shape and torch.allclose(asked, logits.to(asked.device), equal_nan=True)
        return same and float(output.loss) == 1

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _usual_loss, ()  # what a copy of the model gets

    def leave(self) -> None:
        """Put the model's own back."""
        del self._attributes["_loss_function"]
        if self._usual is not None:
            self._attributes["_loss_function"] = self._usual


def _usual_loss() -> Any:
    return ForCausalLMLoss


@dataclass
class _Call:
    """One forward pass that has been taken over."""

    owner: nn.Module  # whose forward it is
    given: dict[str, Any]  # the arguments that it would have got
    next_labels: Tensor  # (B, T): the label of each token's successor
    place: Tensor  # of the tokens with such a label, in the flattened batch: (N,)
    rows: Tensor  # of the same in the hidden states
    shape: torch.Size  # of the tokens that the model gets
    probed: list[int]  # positions whose logits the model computes too
    spy: _Spy | None
    hidden: Tensor | None = None


class ModelGraft(Measured):
    """The hooks of one causal language model.

    Attributes:
        packs: whether padding is left out.
        keep_ratio: share of the vocabulary that the gradient of the logits is multiplied with.
        mode: what becomes of that gradient: estimated so, or exact, with or without a measurement of the estimate.
        step: of the optimizer. What is drawn depends on it, on `seed` and on the call within the step: nothing of it
            has to be saved for a run that is resumed.
        smoothing: label smoothing of the loss.
    """

    def __init__(self, switch: Switch, *, packs: bool, keep_ratio: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.switch, self.packs, self.keep_ratio, self.seed = switch, packs, keep_ratio, seed
        self.mode = Mode.ESTIMATE
        self.begin(0)
        self.smoothing = 0.0
        self._logits: Logits | None = None  # None until a call has been compared with the model's own head
        self._refused = False
        self._left: set[str] = set()  # reasons that were said
        self._inside: dict[str, nn.Module] | None = None  # of the decoder, listed once
        self._call: _Call | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_call": None, "_inside": None}

    def settle(self, module: nn.Module) -> None:
        """Forget a forward that was interrupted, and never came to its end."""
        self._take_call()

    def _take_call(self) -> _Call | None:
        """The call that is under way; it ends here."""
        call, self._call = self._call, None
        if call is not None and call.spy is not None:
            call.spy.leave()
        return call

    def begin(self, step: int) -> None:
        """An optimizer step begins."""
        self.step, self._calls = step, 0

    def _draw(self) -> int:
        """A seed for the next call."""
        self._calls += 1
        return zlib.crc32(f"{self.seed} {self.step} {self._calls}".encode())

    @contextmanager
    def through(self, keep_ratio: float) -> Iterator[None]:
        """Take the gradient of the logits through this share of the vocabulary, for a while; with the same draws."""
        usual = self.keep_ratio, self.mode, self._calls
        self.keep_ratio, self.mode, self._calls = keep_ratio, Mode.ESTIMATE, 0
        try:
            yield
        finally:
            self.keep_ratio, self.mode, self._calls = usual

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook (with kwargs) of the model, and of the PEFT tuner around it: some callers bypass one."""
        under_way = self._call
        if under_way is not None and under_way.owner is not module and kwargs.get("logits_to_keep") == under_way.probed:
            return None  # the tuner's forward, now at the model's
        self._take_call()  # if there is one, it was interrupted by what no hook hears of
        if torch.compiler.is_compiling() or not self.switch.on or self._refused:
            return None
        causal = _language_model(module)
        if getattr(module, "_is_replica", False) or not _at_hand(causal.get_output_embeddings()):
            return None
        names = tuple(inspect.signature(type(causal).forward).parameters)[1:] if args else ()
        given = dict(zip(names, args, strict=False)) | kwargs
        labels, scored = given.get("labels"), bool(given.get(_TRL))
        trains = module.training and torch.is_grad_enabled()
        if not isinstance(labels, Tensor) or not _fit(labels, given) or any(_set(given.get(name)) for name in _REFUSED):
            return None
        if any(_set(given.get(name, getattr(causal.config, name, None))) for name in _OUTPUTS):
            return None
        if given.get("ignore_index", IGNORED) != IGNORED:
            return None
        if not (_trl_can_be_served(causal) if scored else trains) or given.get("return_dict") is False:
            return None
        if reason := _not_ours(causal):  # so it was at first, or nothing would be hooked here
            self._leave(f"{reason} by now")
            return None
        next_labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        place = (next_labels.flatten() != IGNORED).nonzero()[:, 0]
        if not len(place) and not gathers(causal):
            return None

        rows, columns, shape = place, place % labels.shape[1], labels.shape
        inputs = self._packed(causal, given, next_labels)
        if inputs is not None:
            index, shape = inputs.pop("index"), inputs["input_ids"].shape
            back = torch.full_like(labels.flatten(), -1)
            back[index] = torch.arange(len(index), device=index.device)
            rows = columns = back[place]
        passed = {k: v for k, v in given.items() if k not in ("labels", "num_items_in_batch", _TRL)} | (inputs or {})
        probed, spy = [], None
        if self._logits is None:
            # Labels of these positions, for models that compute a loss by themselves; two at least, as they may shift.
            probed = [0, *columns[:_PROBED].tolist()]
            passed["labels"] = torch.arange(len(probed), device=labels.device).repeat(shape[0], 1)
            spy = _Spy(causal, passed["labels"])
        # A list, as a tensor would have to be where the last of the model's layers is.
        passed |= {"logits_to_keep": probed, "use_cache": False}
        self._call = _Call(module, given, next_labels, place, rows, shape, probed, spy)
        return (), passed

    def body(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the decoder under the head."""
        if self._call is not None:
            self._call.hidden = output[0]

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook (with kwargs, always called) of the modules that `before` hooks."""
        call = self._call
        if call is None or call.owner is not module:
            return None
        self._take_call()
        if output is None:
            return None
        causal, given = _language_model(module), call.given
        if call.hidden is None or call.hidden.shape[:2] != call.shape:
            self._refuse(f"{type(causal).__name__} computes past the decoder under its head")
            return self._own(module, given)
        head: Any = causal.get_output_embeddings()
        hidden = call.hidden.to(head.weight.device)
        # FSDP2 leaves the head's parameters sharded outside its own forward.
        weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
        if call.spy is not None:
            known = call.spy.agrees(output)
            finite = not known or bool(output.logits.isfinite().all())
            found = None
            if known and finite:
                found = _recognise(causal.config, hidden[:, call.probed], weight, bias, output.logits)
            unclear, refused = int(found is None), int(finite and found is None)
            if gathers(causal):  # who computes more than the others would wait for them, for ever
                ((unclear, refused),) = largest_of_all([[unclear, refused]], hidden.device)
            if refused:
                what = "does something to its logits that is not known" if known else "has a loss of its own"
                self._refuse(f"{type(causal).__name__} {what}")
            if unclear:  # nothing to recognise the head by, yet or ever
                return self._own(module, given)
            self._logits = found
        scored = bool(given.get(_TRL))
        rows, targets = call.rows.to(hidden.device), call.next_labels.flatten()[call.place].to(hidden.device)
        scores = score_tokens(
            hidden,
            rows,
            targets,
            weight,
            bias,
            logits=self._logits,
            smoothing=self.smoothing,
            statistics=scored,
            keep_ratio=1.0 if self.mode is Mode.EXACT else self.keep_ratio,
            seed=self._draw() if torch.is_grad_enabled() else 0,  # evaluations are no part of a step
            measure=self.measure if self.mode is Mode.OBSERVE and self.keep_ratio < 1 else None,
        )
        items = given.get("num_items_in_batch")
        items = items.to(hidden.device) if isinstance(items, Tensor) else len(rows) if items is None else items
        loss = -scores.log_probs.sum() / items
        if not scored:
            return type(output)(**{**output, "loss": loss, "logits": None})

        def spread(of: Tensor) -> Tensor:
            full = of.new_zeros(call.next_labels.numel()).index_copy(0, call.place.to(of.device), of)
            return full.view(call.next_labels.shape)[:, :-1]

        assert scores.entropy is not None
        assert scores.top1 is not None
        return ScoredOutput(
            loss=loss,
            log_probs=spread(scores.log_probs),
            entropy=spread(scores.entropy),
            is_top1=spread(scores.top1),
            label_mask=call.next_labels[:, :-1] != IGNORED,
        )

    def _refuse(self, reason: str) -> None:
        """Leave this and all later calls to the model, and say why."""
        self._refused = True
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        """Say, once, why the loss is the model's own."""
        if self.smoothing:
            raise CELoraError(f"{reason}, so its labels cannot be smoothed here; attach with labelled_head=False.")
        if reason not in self._left:
            self._left.add(reason)
            warnings.warn(
                f"celora: {reason}; its own loss is used, over all tokens and with their padding.", stacklevel=2
            )

    def _own(self, module: nn.Module, given: dict[str, Any]) -> Any:
        """What the model makes of this call by itself."""
        refused, self._refused = self._refused, True
        try:
            return module(**given)
        finally:
            self._refused = refused

    def _packed(self, causal: Any, given: Mapping[str, Any], next_labels: Tensor) -> dict[str, Any] | None:
        """The arguments of the batch without its padding, and the index of its tokens; None to leave it as it is."""
        ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if not self.packs or any(given.get(name) is not None for name in _UNPACKED):
            return None
        if not isinstance(ids, Tensor) or (mask is None and positions is not None) or ids.shape != next_labels.shape:
            return None
        if any(t is not None and t.shape != ids.shape for t in (mask, positions)):
            return None
        if self._inside is None:
            self._inside = dict(causal.base_model.named_modules())
        if reason := _watched(self._inside):
            if reason not in self._left:
                self._left.add(reason)
                warnings.warn(f"celora: padding stays in batches: {reason}.", stacklevel=2)
            return None
        return packing.pack(causal, ids, mask, positions, next_labels)


# Whose hooks do not look at the shape of a batch, but for NEFTune's.
_BLIND = ("torch", "bitsandbytes", "deepspeed", "accelerate", "transformers", "trl")
_HOOKS = (LayerGraft, Lender, ModelGraft, Pass)


def _may_look(hook: Any) -> str:
    """The name of a hook that may look at the shape of a batch, or ''."""
    function = inspect.unwrap(getattr(hook, "func", hook))
    called: str = getattr(function, "__name__", type(function).__name__)
    origin = (getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]
    blind = origin in _BLIND and called != "neftune_post_forward_hook"
    return "" if blind or called.startswith("make_inputs_require_grad") else called


def _watched(modules: Mapping[str, nn.Module]) -> str:
    """Whose forward hooks would see that a batch is packed, or ''.

    NEFTune's noise, for one, depends on the number of tokens; PEFT's aLoRA looks at the rows of the batch; and what
    users hook is theirs.
    """
    for name, module in modules.items():
        if not (module._forward_hooks or module._forward_pre_hooks):
            continue  # of thousands, in every call
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not isinstance(getattr(hook, "__self__", hook), _HOOKS) and (called := _may_look(hook)):
                return f"{name or 'the decoder'} has a forward hook ({called}) that may depend on a batch's shape"
    return ""


def install(
    causal: PreTrainedModel, tuner: nn.Module | None, switch: Switch, *, packs: bool, keep_ratio: float, seed: int
) -> ModelGraft:
    """Hook the language model (and the PEFT tuner around it) that `find_language_model` found; `remove` undoes it."""
    graft = ModelGraft(switch, packs=packs, keep_ratio=keep_ratio, seed=seed)
    _hook(graft, causal, tuner)
    return graft


def _hook(graft: ModelGraft, causal: PreTrainedModel, tuner: nn.Module | None) -> list[RemovableHandle]:
    if graft.packs and causal.config._attn_implementation == "sdpa":
        register()
        causal.set_attn_implementation(ATTENTION)
    handles = [causal.base_model.register_forward_hook(graft.body)]
    for module in (causal, tuner):
        if module is not None:
            handles.append(module.register_forward_pre_hook(graft.before, with_kwargs=True))
            handles.append(module.register_forward_hook(graft.after, with_kwargs=True, always_call=True))
    return handles


@contextmanager
def taken_over(model: nn.Module) -> Iterator[ModelGraft | None]:
    """For a while, leave out padding and compute the loss over labelled tokens only, wherever that can be done.

    Yields what does it, or None where it cannot be done.
    """
    causal, tuner, _ = find_language_model(model)
    if causal is None:
        yield None
        return
    before = causal.config._attn_implementation
    graft = ModelGraft(Switch(), packs=not packing.cannot_pack(causal))
    handles = _hook(graft, causal, tuner)
    try:
        yield graft
    finally:
        graft.settle(causal)
        for handle in handles:
            handle.remove()
        if before == "sdpa":
            causal.set_attn_implementation(before)


def remove(module: nn.Module) -> None:
    """Take every hook of `install` (and of `celora.fused`, and every graft) off this one module."""
    settle(module)
    tables: list[list[dict[int, Any]]] = [
        [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs],
        [module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called],
    ]
    for hooks, *marks in tables:
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", hook), _HOOKS)]:
            for of in (hooks, *marks):
                of.pop(key, None)
    config = getattr(module, "config", None)
    if isinstance(module, PreTrainedModel) and getattr(config, "_attn_implementation", None) == ATTENTION:
        module.set_attn_implementation("sdpa")


def settle(module: nn.Module) -> None:
    """Put back what a forward that was interrupted has left as it was half-way, in this one module."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Lender | ModelGraft):
            owner.settle(module)


def find_language_model(model: nn.Module) -> tuple[PreTrainedModel | None, nn.Module | None, str]:
    """The causal language model in `model` and the PEFT tuner around it, if any; or why its own loss is to be used."""
    tuner = next((m for m in model.modules() if isinstance(m, BaseTuner)), None)
    causal = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if causal is None:
        return None, None, f"{type(model).__name__} is not a model of Transformers"
    if reason := _not_ours(causal):
        return None, None, reason
    takes = {"labels", "logits_to_keep"} <= inspect.signature(type(causal).forward).parameters.keys()
    if not (takes and any(map(_asks_for_the_loss, type(causal).__mro__))):
        reason = f"{type(causal).__name__} has a loss of its own"
    elif tuner is not None and type(tuner).forward is not BaseTuner.forward:
        reason = f"{type(tuner).__name__} has a forward of its own, which may add to the loss"
    elif getattr(causal.config, "output_router_logits", False):
        reason = "a part of it is for its experts"
    elif causal.base_model is causal:
        reason = f"{type(causal).__name__} has no decoder under its head"
    else:
        return causal, tuner, ""
    return None, None, reason


def _not_ours(causal: PreTrainedModel) -> str:
    """Why the head and the loss of this model, as they are now, are not those that are computed here, or ''."""
    head: Any = causal.get_output_embeddings()
    if type(head) is not nn.Linear:
        of = "no head" if head is None else f"a {type(head).__name__} as its head"
        return f"{type(causal).__name__} has {'an adapter on its head' if isinstance(head, BaseTunerLayer) else of}"
    # FSDP2's own, whose parameters are sharded, are served.
    if (head._forward_hooks or head._forward_pre_hooks) and not isinstance(head.weight, DTensor):
        return f"{type(causal).__name__} has a Linear with hooks as its head"
    if is_split(head):
        return "its head is split by tensor parallelism"
    if head.weight.requires_grad or not head.weight.is_floating_point():
        return "its head is trained or quantised"
    if causal.loss_function is not ForCausalLMLoss:
        return f"{type(causal).__name__} has a loss of its own"
    return ""


def _asks_for_the_loss(kind: type) -> bool:
    """Whether the forward of this class reads `loss_function`; only a call shows what it does with it."""
    code = getattr(inspect.unwrap(vars(kind).get("forward", object)), "__code__", None)
    return code is not None and "loss_function" in code.co_names


def _fit(labels: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether these are labels for the tokens; a model's own error says best what is wrong with others."""
    if labels.dtype != torch.int64 or labels.dim() != 2:
        return False
    tokens: Any = next((of for name in ("input_ids", "inputs_embeds") if (of := given.get(name)) is not None), None)
    return isinstance(tokens, Tensor) and tokens.shape[:2] == labels.shape


def _language_model(module: nn.Module) -> Any:
    """The causal language model that a hooked module is or wraps."""
    return module.model if isinstance(module, BaseTuner) else module


def _set(value: Any) -> bool:
    return isinstance(value, Tensor) or value not in (None, False, 0)


def _at_hand(head: Any) -> bool:
    """Whether the head's weight is here to be multiplied: not offloaded, and not partitioned by DeepSpeed."""
    weight = getattr(head, "weight", None)
    return weight is None or (weight.device.type != "meta" and not hasattr(weight, "ds_id"))


def _trl_can_be_served(causal: nn.Module) -> bool:
    """Whether TRL's fused head, as it was added to this model, computes nothing that ours does not."""
    forward = causal.__dict__.get("forward")
    if forward is None:
        return False
    settings = inspect.getclosurevars(forward).nonlocals
    outputs, temperature = settings.get("outputs", ("?",)), settings.get("temperature")
    return set(outputs) <= _TRL_FIELDS and temperature == 1 and settings.get("cast_lm_head_to_fp32") is False


def _recognise(config: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> Logits | None:
    """What the model does to its logits: whatever its configuration names that reproduces these, or None."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        h = hidden.float()  # and not all of the weight, which would be the peak of the first step
        z = torch.cat([F.linear(h, part.float()) for part in weight.split(_WORDS)], -1)
        expected = logits.to(z.device, torch.float32)  # which a model that lies on several devices moves to its first
        if bias is not None:
            z += bias.float()
    scales = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier", "output_multiplier")]
    if division := getattr(config, "logits_scaling", None):
        scales += [1 / division, division]
    caps = [getattr(config, "final_logit_softcapping", None), None]
    # Logits are rounded to the model's dtype; the largest tells how coarsely.
    allowed = 8 * torch.finfo(logits.dtype).eps * expected.abs().max()
    for scale, cap in itertools.product([*(s for s in scales if s), 1.0], dict.fromkeys(caps)):
        found = Logits(float(scale), None if cap is None else float(cap))
        if (found(z.clone()) - expected).abs().max() <= allowed:
            return found
    return None
