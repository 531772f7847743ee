"""The dtype of the base model: as the user names it, as measured, as memory allows, and as the run began."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import celora.studies.compare as compare_module
from celora.studies.compare import compare
from celora.train.dtype import dtype_to_use, for_device, settle_dtype
from celora.train.loading import load_model
from celora.train.request.arguments import make_request, parse
from celora.train.run import train
from patching import patch_all
from tiny import save_rows, save_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes bfloat16 sixteen times slower than float32."""
    measured(monkeypatch, 16.0)


def measured(patch: pytest.MonkeyPatch, ratio: float) -> None:
    patch_all(patch, "celora.machine.timing:time_over_float32", lambda dtype, device: ratio)
    patch_all(patch, "celora.machine.timing:slower_than_float32", lambda dtype, device: ratio > 1.5)


@pytest.fixture(params=["bfloat16"])
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    folder = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, request.param))
    model.save_pretrained(folder)
    return {"model": str(folder), "data": str(save_rows(tmp_path / "rows.jsonl")), "output": str(tmp_path / "out")}


def settled(inputs: dict[str, str], earlier: dict[str, Any] | None = None, **more: Any) -> tuple[str, str]:
    request = make_request(inputs | more)
    args = SimpleNamespace(device=CPU, **{name: request.train.get(name, False) for name in ("bf16", "fp16")})
    request, line = settle_dtype(request, args, earlier)
    return str(request.lora["dtype"]), line


@pytest.mark.parametrize(
    ("own", "ratio", "free", "chosen", "why"),
    [
        (torch.bfloat16, 0.5, 100, "bfloat16", "as the checkpoint is, and bfloat16 products take 0.5 times as long"),
        (torch.bfloat16, 1.4, 100, "bfloat16", "as the checkpoint is, and bfloat16 products take 1.4 times as long"),
        (torch.bfloat16, 16, 100, "float32", "bfloat16 products take 16 times as long as float32's here; --dtype"),
        (torch.bfloat16, 16, None, "float32", "bfloat16 products take 16 times as long"),  # the free memory is unknown
        (
            torch.bfloat16,
            16,
            10,
            "bfloat16",
            "float32 would need 8.00 GiB of the 10.00 GiB that are free; bfloat16 pro",
        ),
        (torch.float16, 0.5, 100, "float32", "the checkpoint's float16 loses small gradients; --dtype bfloat16 takes"),
        (torch.float16, 16, 10, "bfloat16", "8.00 GiB of the 10.00 GiB that are free; float16 loses small gradients"),
    ],
)
def test_what_is_chosen_for_a_checkpoint_of_half_precision(
    own: torch.dtype, ratio: float, free: float | None, chosen: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, ratio)
    patch_all(
        monkeypatch, "celora.machine.memory:available_memory", lambda device: None if free is None else free * 2**30
    )
    found, said = for_device(own, CPU, 8 * 2**30)
    assert found == chosen
    assert why in said


@pytest.mark.parametrize("inputs", ["bfloat16", "float16"], indirect=True)
def test_beside_a_base_in_8_bits_float32_has_to_fit_too(
    inputs: dict[str, str], emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings, head and norms are in float32 only if there is room for them beside the bytes."""
    model = AutoModelForCausalLM.from_pretrained(inputs["model"])
    in_blocks = sum(p.numel() for name, p in model.named_parameters() if "layers." in name and p.dim() == 2)
    need = 4 * sum(p.numel() for p in model.parameters()) - 3 * in_blocks
    for free, chosen in ((1.45 * need, "float32"), (1.4 * need, "bfloat16")):
        patch_all(monkeypatch, "celora.machine.memory:available_memory", lambda device, free=free: int(free))
        assert settled(inputs, base="int8")[0] == chosen
        assert settled(inputs)[0] == "bfloat16"


@pytest.mark.parametrize("inputs", ["bfloat16", "float16", "float32"], indirect=True)
def test_nobody_named_a_dtype(inputs: dict[str, str], emulated: None) -> None:
    chosen, line = settled(inputs)
    own = json.loads((Path(inputs["model"]) / "config.json").read_text())["dtype"]
    assert chosen == ("auto" if own == "float32" else "float32")
    assert line.startswith("Base model in ")
    assert load_model(make_request(inputs | {"dtype": chosen})).dtype == torch.float32


def test_what_was_named_is_kept(inputs: dict[str, str], emulated: None, tmp_path: Path) -> None:
    assert settled(inputs, dtype="bfloat16") == ("bfloat16", "Base model in bfloat16: as the settings say.")
    assert settled(inputs, dtype="auto") == ("auto", "Base model in its own dtype: as the settings say.")
    assert settled(inputs, model_init_kwargs={"torch_dtype": "bfloat16"})[0] == "bfloat16"
    (tmp_path / "run.yaml").write_text("dtype: bfloat16\n")
    request = parse(["--config", str(tmp_path / "run.yaml")], inputs)
    args = SimpleNamespace(device=CPU, bf16=False, fp16=False)
    assert settle_dtype(request, args)[0].lora["dtype"] == "bfloat16"


@pytest.mark.parametrize("inputs", ["bfloat16", "float16", "float32"], indirect=True)
@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_what_is_emulated_here_is_used_in_float32(
    inputs: dict[str, str], dtype: str, multiplied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter may be trained in bfloat16 on one machine, and used on another."""
    patch_all(monkeypatch, "celora.machine.cpu:multiplies", lambda dtype: multiplied)
    own = json.loads((Path(inputs["model"]) / "config.json").read_text())["dtype"]
    half = (own if dtype == "auto" else dtype) != "float32"
    request = make_request(inputs | {"dtype": dtype})
    assert dtype_to_use(request, CPU) == ("float32" if half and not multiplied else dtype)
    assert dtype_to_use(request, torch.device("cuda")) == dtype
    assert dtype_to_use(make_request(inputs | {"dtype": dtype, "load_in_8bit": True}), CPU) == dtype
    patch_all(monkeypatch, "celora.machine.memory:available_memory", lambda device: 0)
    assert dtype_to_use(request, CPU) == dtype


def test_mixed_precision_is_the_users_choice(inputs: dict[str, str], emulated: None) -> None:
    assert settled(inputs, bf16=True) == ("auto", "Base model in its own dtype: products are computed in bfloat16.")


def test_a_run_goes_on_in_its_dtype(inputs: dict[str, str], emulated: None) -> None:
    for name in ("bfloat16", "auto"):  # an earlier version recorded the dtype that the user gave
        assert settled(inputs, {"lora": {"dtype": name}})[0] == name


def test_a_run_says_its_dtype_and_resumes_in_it(
    inputs: dict[str, str], emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4, "preset": "off"}
    console = Console(file=io.StringIO(), width=200)
    result = train(make_request(inputs | short), console=console)
    assert "Base model in float32: bfloat16 products take 16 times as long" in console.file.getvalue()
    record = json.loads((Path(inputs["output"]) / "run.json").read_text())
    assert record["lora"]["dtype"] == "float32"
    assert "dtype" not in record["given"]
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}

    measured(monkeypatch, 0.5)  # a resumed run does not measure again, so another machine's speed does not matter
    console = Console(file=io.StringIO(), width=200)
    request = parse(["--max_steps", "2"], {"output": inputs["output"], "resume": True})
    resumed = train(request, console=console)
    assert "Base model in float32: as the run began." in console.file.getvalue()
    assert {p.dtype for p in resumed.model.parameters()} == {torch.float32}


def test_all_arms_of_a_comparison_have_one_dtype(
    inputs: dict[str, str], emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    run = compare_module._run

    def counted(arm: str, seed: int, own: dict[str, Any], folder: Path, console: Console) -> Any:
        measured(monkeypatch, 0.5)  # a busy machine may measure this later
        chosen.append(own["dtype"])
        return run(arm, seed, own, folder, console)

    patch_all(monkeypatch, "celora.studies.compare:_run", counted)
    settings = inputs | {"max_steps": 1, "quiet": True, "report_to": "none"}
    compare(settings, arms=("LoRA", "exact"), seeds=1)
    compare(settings, arms=("LoRA", "exact"), seeds=2)  # continues the first comparison
    assert chosen == ["float32"] * 6
    records = [json.loads(file.read_text()) for file in Path(inputs["output"]).glob("*-seed*/run.json")]
    assert {record["lora"]["dtype"] for record in records} == {"float32"}
