"""The forward of a whole language model in training: without padding, and with the loss over labelled tokens only.

Neither changes a result. Hooks give the model a batch without padding (`packing`), and `logits_to_keep`, so that it
computes no logits. Then they put the loss into its output (`celora.numerics.head`). The first call, and the first call
after a change, checks that the model's head and loss are the ones that celora computes (`recognise`). A batch is packed
only if celora knows every argument of its call. These are hooks, not a `forward` of the model's own: with that, a
replica of `nn.DataParallel` would use the original's weights, and TRL's trainers replace `forward` themselves.
"""

from __future__ import annotations

import inspect
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from celora.errors import CELoraError
from celora.machine.processes import gathers, largest_of_all
from celora.modeling import left_padding, packing
from celora.modeling.attention import LENGTHS, Lookup, is_attention, may_replace, use_ours
from celora.modeling.call import (
    TRL,
    Call,
    OpenCalls,
    fit,
    known_by,
    stays_padded,
    takes,
    unknown_arguments,
    unknown_tensor,
    wants_own_head,
)
from celora.modeling.compiled import is_compiled
from celora.modeling.eight_bit import EightBitHead
from celora.modeling.graft import has_numbers, in_dispatch_mode, scripted
from celora.modeling.hooks import Hook, nothing, settle_all
from celora.modeling.language_model import LanguageModel, at_hand, language_model, not_ours
from celora.modeling.others import fused_head, trainer_wants_logits
from celora.modeling.recognise import IGNORED, Probe
from celora.modeling.switch import Mode, Switch
from celora.numerics.head import Logits, mean_logits, score_tokens
from celora.numerics.head_in_graph import Scorer
from celora.numerics.measured import Measured
from celora.settings.config import CELoraConfig
from celora.weights.read import shape_of
from celora.weights.sharded import whole


class ModelGraft(Measured, Hook):
    """The hooks of one causal language model.

    Attributes:
        packs: whether padding is left out.
        keep_ratio: share of the vocabulary that the gradient of the logits is multiplied with.
        eight_bit: computes the logits in 8 bits; None if the configuration wants them exact.
        scorer: scores a chunk of tokens in a graph (`celora.compile_model`); None if only kernels do.
        mode: whether that gradient is estimated or exact, and whether the estimate's error is measured.
        step: the optimizer's step. Draws depend on `seed`, step and number of the call, so a resumed run repeats them.
        smoothing: label smoothing of the loss. A call that celora cannot smooth is an error.
        logits: what the model does to its logits; None until a call has been compared with the model's own head.
        refused: whether the model's head or loss turned out to be different. The model then computes its own loss.
    """

    _added: tuple[str, ...] | None = None  # attributes that a probe added to the model that this is a copy of

    eight_bit: EightBitHead | None = None
    scorer: Scorer | None = None

    def __init__(self, switch: Switch, *, packs: bool, keep_ratio: float = 1, seed: int = 0):
        super().__init__()
        self.switch, self.packs, self.keep_ratio, self.seed = switch, packs, keep_ratio, seed
        self.mode, self.smoothing = Mode.ESTIMATE, 0.0
        self._probed_by: Callable[[], Tensor | None] = nothing  # the labels of the call that probed, in this step
        self.begin(0)
        self.logits: Logits | None = None
        self.refused = False
        self._known: Any = None  # `known_by` of the model when it was probed
        self._open = OpenCalls()

    def __getstate__(self) -> dict[str, Any]:
        probe = self._call and self._call.probe
        changed = {"_open": OpenCalls(), "_known": None, "_probed_by": nothing, "_added": probe and probe.added}
        return {**self.__dict__, **changed, "scorer": None}  # the copy of a compiled decoder is not compiled

    @property
    def _call(self) -> Call | None:
        return self._open.current

    def settle(self, module: nn.Module) -> None:
        """Forget an interrupted forward, of this model or of the model that it is a copy of."""
        self._open.forget()
        own = vars(language_model(module))  # those of the decoder have none
        self._added = tuple(name for name in self._added or () if own.pop(name, None) is None)

    def begin(self, step: int) -> None:
        """Begin an optimizer step."""
        self.step, self._calls, self._probed_by = step, 0, nothing

    def _draw(self) -> int:
        """A seed for the next call."""
        self._calls += 1
        return zlib.crc32(f"{self.seed} {self.step} {self._calls}".encode())

    @contextmanager
    def through(self, keep_ratio: float) -> Iterator[None]:
        """For a while, estimate the gradient of the logits with this share of the vocabulary, with the same draws."""
        usual = self.keep_ratio, self.mode, self._calls
        self.keep_ratio, self.mode, self._calls = keep_ratio, Mode.ESTIMATE, 0
        try:
            yield
        finally:
            self.keep_ratio, self.mode, self._calls = usual

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook (with kwargs) of the model, whose other hooks see the loss as they see the model's own.

        A tuner that calls the model's forward past all hooks has this one instead.
        """
        if self._in_a_call():
            self._open.step_aside()
            return None
        self.switch.astray = False
        if not self.switch.on or scripted() or (torch.compiler.is_compiling() and not self.smoothing):
            return None
        causal = language_model(module)
        names = tuple(inspect.signature(type(causal).forward).parameters)[1:] if args else ()
        given = dict(zip(names, args, strict=False)) | kwargs
        # With smoothing, a call in evaluation counts, too, because Trainer's smoother also smooths there.
        labels, trains = given.get("labels"), torch.is_grad_enabled() and (module.training or self.smoothing > 0)
        if not isinstance(labels, Tensor) or not has_numbers(labels) or not (trains or given.get(TRL)):
            return None
        if (reason := self._not_here(causal, given, labels)) is not None:
            self._leave(reason)
            return None
        return self._begin(causal, given, labels)

    def _not_here(self, causal: Any, given: Mapping[str, Any], labels: Tensor) -> str | None:
        """Why the model computes the loss of this call; '' if the user knows why; None if celora computes it."""
        if torch.compiler.is_compiling():
            return "torch.compile is tracing it"
        if getattr(causal, "_is_replica", False):
            return "nn.DataParallel gives each device a copy of the model, and to those celora does nothing"
        if (self.refused and not self._again(labels)) or not at_hand(causal.get_output_embeddings()):
            return ""
        if not fit(labels, given) or wants_own_head(given, causal.config):
            return ""
        if reason := not_ours(causal):  # this has changed since `attach`
            return f"{reason} by now"
        if name := unknown_tensor(causal, given):
            return f"{type(causal).__name__} may compute its loss with {name!r}"
        if given.get(TRL):
            found = fused_head(causal)
            return found if isinstance(found, str) else None
        return trainer_wants_logits() or None

    def _begin(self, causal: Any, given: dict[str, Any], labels: Tensor) -> Any:
        """Begin to compute a call's loss. Returns the model's new arguments, or None if the model computes it."""
        known, probe = known_by(causal, given), None
        if self._known is not None and (name := known.changed_number(self._known)):
            self._refuse(f"{type(causal).__name__} changes {name!r} while it trains, which may decide about its loss")
            return None
        mask = given.get("attention_mask")
        labels = labels.to(mask.device) if isinstance(mask, Tensor) else labels
        next_labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        labelled = next_labels != IGNORED
        astray = left_padding.predicts_a_label(labelled, mask)
        numbers, packs = torch.stack([labelled.sum(), astray]), self._packs(causal, given, labels.shape)
        if packs:
            kept, more = packing.measure(labelled, mask)
            numbers = torch.cat([numbers, more])
        count, astray, *read = numbers.tolist()  # the only wait for the device, when it is idle
        if not count and not gathers(causal):
            return None
        place = packing.places(labelled.flatten(), count)
        passed = {k: v for k, v in given.items() if k not in ("labels", "num_items_in_batch", TRL)}
        inputs, rows, shape = None, place, labels.shape
        if packs:
            inputs = packing.pack(causal, given["input_ids"], given.get("position_ids"), kept, read)
            if window := packing.window_exceeded(causal.config, read):
                self.switch.say_once("window", packing.BEYOND_WINDOW.format(window))
        if inputs is not None:
            passed |= inputs
            rows, shape = kept.flatten().cumsum(0)[place] - 1, inputs["input_ids"].shape
        elif self.packs and not is_compiled(causal.base_model) and may_replace(causal.config, labels.device):
            passed[LENGTHS] = None  # not packed; our attention is used if it is faster
        passed["logits_to_keep"] = slice(0, 0)  # not a tensor, which has a device, nor a list, which is copied to one
        if known != self._known or self._again(given["labels"]):
            items = given.get("num_items_in_batch")
            probe = Probe(causal, shape, items, labels.device)
            passed |= {"logits_to_keep": probe.positions, "labels": probe.labels}
            if items is not None:
                passed["num_items_in_batch"] = items
        # Without cache and mask, Transformers finds packed sequences in the positions, and makes a mask for them.
        # Before version 5 it also does so with positions of its own. With a cache it does not.
        plain = given.get("position_ids") is None and not unknown_arguments(given)
        if inputs is not None or plain or given.get("attention_mask") is not None:
            passed["use_cache"] = False
        if probe is not None and self._known is None and not takes(causal, passed):
            self._refuse(f"{type(causal).__name__} cannot compute the loss of a few tokens")
            return None
        self.switch.astray = bool(astray)
        if probe is not None:
            probe.enter(causal, self.at_head)
            self._probed_by = weakref.ref(given["labels"])
        self._open.current = Call(
            causal, given, next_labels, place, rows, shape, known, probe, passed["logits_to_keep"]
        )
        if passed.get(LENGTHS) == ():
            use_ours(causal.config)  # a compiled attention cannot change what its configuration names
        return (), passed

    def _again(self, labels: Tensor) -> bool:
        """Whether these are the labels of the call that probed, in the same step. Then this call probes again.

        A checkpoint repeats a call in backward, and must save the same tensors. Nothing tells which one of several
        calls with the same labels is repeated.
        """
        return self._probed_by() is labels

    def enters(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the decoder under the head, which someone may call without the head."""
        if not torch.compiler.is_compiling() and not self._in_a_call():
            self.switch.astray = False

    def _in_a_call(self) -> bool:
        """Whether a call goes on. One that was interrupted is forgotten."""
        call = self._open.outermost
        if call is not None and not call.goes_on():
            settle_all(call.owner)
        return self._open.outermost is not None

    def body(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook (with kwargs) of the decoder under the head."""
        if self._call is not None:
            self._call.hidden = output[0]
        else:
            left_padding.watch(self.switch, module, kwargs, output)

    def at_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A forward hook of the head, in a call that probes it."""
        call = self._call
        if call is None or call.probe is None or call.hidden is None or not args:
            return None
        return call.probe.answer(module, args[0], output, call.hidden, call.owner.config)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook (with kwargs, always called) of the same model."""
        if self._open.around and not self._open.step_back(self.at_head, kwargs):
            return None
        call, causal = self._call, language_model(module)
        if call is None or call.owner is not causal:
            return None
        self._open.end()
        if output is None:
            return None
        known = self._recognised(causal, call, output)
        return self._scored(causal, call, output) if known else self._own(module, call.given)

    def _recognised(self, causal: Any, call: Call, output: Any) -> bool:
        """Whether head and loss are known after this call. If not, warn, and let the model compute its own loss."""
        name, why, found = type(causal).__name__, "", self.logits
        if call.hidden is None or call.hidden.shape[:2] != call.shape:
            why = "computes past the decoder under its head"
        elif not isinstance(output, ModelOutput):
            why = "returns no output with names"
        elif call.probe is not None:
            verdict = call.probe.verdict(output, causal.config)
            found, why = (None, verdict) if isinstance(verdict, str) else (verdict, "")
        if not why and call.given.get(TRL):
            fused = fused_head(causal)
            if isinstance(fused, str) or fused.logits != found:
                why = "has logits that TRL's fused head computes otherwise"
        refused = int(bool(why))
        if self.logits is None and gathers(causal):  # all processes or none: one that gathers alone waits for ever
            ((refused,),) = largest_of_all([[refused]], causal.get_output_embeddings().weight.device)
        if refused:
            self._refuse(f"{name} {why or 'is not known to another process'}")
            return False
        self.logits, self._known = found, call.known
        return True

    def _scored(self, causal: Any, call: Call, output: Any) -> Any:
        """The model's output with celora's loss in it."""
        given, head = call.given, causal.get_output_embeddings()
        assert call.hidden is not None
        hidden = call.hidden.to(head.weight.device)
        # FSDP2 leaves the head's parameters sharded outside its own forward.
        weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
        fused = fused_head(causal) if given.get(TRL) else None
        assert not isinstance(fused, str)
        logits = self.logits if fused is None else fused.scored
        in_8_bits = self.eight_bit if self.switch.forwards else None
        in_8_bits = None if in_8_bits is None or not in_8_bits.applies(head.weight) else in_8_bits
        trains = causal.training and torch.is_grad_enabled() and not in_dispatch_mode()  # which would see measuring
        watched = in_8_bits if in_8_bits is not None and in_8_bits.watches and trains else None
        if watched is not None:
            watched.product.notice()  # or an old copy would count as an error
        rows, targets = call.rows.to(hidden.device), call.next_labels.flatten()[call.place].to(hidden.device)
        scores = score_tokens(
            hidden, rows, targets, weight, bias,
            logits=logits,
            smoothing=self.smoothing,
            statistics=fused is not None,
            keep_ratio=1.0 if self.mode is Mode.EXACT else self.keep_ratio,
            seed=self._draw() if torch.is_grad_enabled() else 0,  # an evaluation does not count as a call
            measure=self.measure if self.mode is Mode.OBSERVE and self.keep_ratio < 1 else None,
            product=None if in_8_bits is None else in_8_bits.product,
            compare=None if watched is None else watched.compare,
            compiled=self.scorer,
        )  # fmt: skip
        items = given.get("num_items_in_batch")
        items = items.to(hidden.device) if isinstance(items, Tensor) else len(rows) if items is None else items
        loss = (-scores.log_probs.sum() / items).to(output.logits.device)  # a model split over devices has moved them
        if fused is None:
            return call.with_loss(output, loss)
        wanted = "mean_logits" in fused.outputs
        return call.for_trl(loss, scores, mean_logits(hidden, rows, weight, bias, fused.scored) if wanted else None)

    def _refuse(self, reason: str) -> None:
        """From now on, let the model compute its own loss, and warn with the reason."""
        self.refused = True
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        """Warn once why the model computes its own loss, unless the reason is ''."""
        if self.smoothing:
            raise CELoraError(
                f"{reason or 'this call is left to the model'}, so its labels cannot be smoothed here; attach with "
                "labelled_head=False."
            )
        if reason:
            self.switch.say_once(f"loss: {reason}", f"{reason}; its own loss is used, with all tokens and padding.")

    def _own(self, module: nn.Module, given: dict[str, Any]) -> Any:
        """The output of a refused model for the labels of the call that probed. It must not probe again."""
        probed_by, self._probed_by = self._probed_by, nothing
        try:
            return module(**given)
        finally:
            self._probed_by = probed_by

    def _packs(self, causal: Any, given: Mapping[str, Any], shape: torch.Size) -> bool:
        """Whether the batch of this call may be packed. Says why not, unless the arguments show it."""
        reason = stays_padded(causal, given, shape) if self.packs else ""
        if reason:
            self.switch.say_once(f"padding: {reason}", f"padding stays in batches: {reason}.")
        return reason is None


def install(found: LanguageModel, switch: Switch, config: CELoraConfig) -> ModelGraft:
    """Hook a language model as this configuration says; `celora.modeling.hooks.remove` undoes it."""
    graft = ModelGraft(
        switch,
        packs=config.padding_free and not found.cannot_pack,
        keep_ratio=config.head_keep_ratio,
        seed=config.seed,
    )
    if config.head_forward != "exact":
        graft.eight_bit = EightBitHead(shape_of(found.head)[1])
    _hook(graft, found)
    return graft


def _hook(graft: ModelGraft, found: LanguageModel) -> list[RemovableHandle]:
    handles = [found.decoder.register_forward_pre_hook(graft.enters)]
    handles.append(found.decoder.register_forward_hook(graft.body, with_kwargs=True))
    for module in filter(None, (found.causal, found.tuner)):
        handles.append(module.register_forward_pre_hook(graft.before, with_kwargs=True))
        handles.append(module.register_forward_hook(graft.after, with_kwargs=True, always_call=True))
    if graft.packs:
        handles.append(found.decoder.register_forward_pre_hook(Lookup().enters))
        handles += [h for module in filter(is_attention, found.causal.modules()) for h in Lookup().under(module)]
    return handles


@contextmanager
def taken_over(found: LanguageModel | None) -> Iterator[ModelGraft | None]:
    """For a while, leave out padding and compute the loss over labelled tokens only.

    Yields the graft that does so; None if there is no language model.
    """
    if found is None:
        yield None
        return
    graft = ModelGraft(Switch(), packs=not found.cannot_pack)
    handles = _hook(graft, found)
    try:
        yield graft
    finally:
        settle_all(found.causal)
        for handle in handles:
            handle.remove()
