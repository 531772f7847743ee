"""`celora estimate --gpu`: bytes are counted, and times follow from published peaks. No GPU is needed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from celora.cli.main import main
from celora.errors import CELoraError
from celora.kernels.backends import TABLE
from celora.train.forecast.blocks import count
from celora.train.forecast.estimate import estimate
from celora.train.forecast.gpu import smallest
from celora.train.forecast.ways import Way
from celora.train.request.arguments import make_request
from patching import patch_all


@pytest.mark.parametrize(("peak", "size"), [(5.7, 6), (5.8, 8), (7.7, 12), (20.9, 24), (21, 40), (77, None)])
def test_the_smallest_card_has_a_twentieth_to_spare(peak: float, size: int | None) -> None:
    assert smallest(Way("int8", "bfloat16", "fast", False, 1, 1, int(peak * 2**30), 1.0, 1.0)) == size


@pytest.fixture
def ask(inputs, tmp_path):
    def found(memory=None, gpu="RTX 4060", **more):
        return estimate(make_request({**inputs, "output": str(tmp_path / "out"), **more}), memory, gpu=gpu)

    return found


def key(way):
    return way.base, way.preset, way.checkpointing, way.batch


def test_ways_on_a_gpu_that_is_not_here(ask):
    before = dict(TABLE)
    found = ask()
    assert before == TABLE  # the kernels are back
    assert (found.gpu, found.memory) == ("RTX 4060", 8 * 2**30)
    assert {(way.base, way.preset) for way in found.ways} == {
        (base, preset) for base in ("float32", "bfloat16", "int8") for preset in ("auto", "fast")
    }
    assert found.taken is not None
    assert found.taken.preset == "auto"
    text = str(found)
    assert "RTX 4060: computed from its published peaks, not measured." in text
    assert "an epoch, at least" in text
    assert "  6 GB  " in text
    assert found.to_dict()["ways"][0]["smallest_gpu_gb"] == 6
    faster = {key(way): way for way in ask(gpu="RTX 4090").ways}
    for way in found.ways:
        assert way.peak_bytes == pytest.approx(faster[key(way)].peak_bytes, rel=1e-4)
        assert way.epoch_seconds > faster[key(way)].epoch_seconds


def test_memory_that_is_asked_for_counts_and_so_does_a_dtype(ask):
    found = ask(1000, preset="exact", dtype="float32")
    assert found.memory == 1000
    assert found.taken is None
    assert {(way.base, way.dtype) for way in found.ways} == {("float32", "float32"), ("int8", "float32")}


def test_autocast_counts_unless_it_is_turned_off(ask):
    """Under autocast, weights in float32 are multiplied in bfloat16, and what is kept is smaller."""
    usual, without = (ask(preset="exact", dtype="float32", **more).ways for more in ({}, {"bf16": False}))
    slower = {key(way): way for way in without}
    for way in usual:
        assert slower[key(way)].epoch_seconds > way.epoch_seconds
        assert slower[key(way)].peak_bytes > way.peak_bytes


def test_short_rows_are_joined_until_adapters_are_fused(ask, tmp_path, monkeypatch):
    """With fewer tokens than that on CPU, celora leaves adapters to PEFT, which keeps more."""
    rows = tmp_path / "short.jsonl"
    rows.write_text('{"text": "w1 w2 w3"}\n' * 3)
    found = [ask(data=str(rows), preset="exact", base="int8", per_device_train_batch_size=1)]
    monkeypatch.setattr("celora.modeling.fused._FEWEST_TOKENS", 96)
    found.append(ask(data=str(rows), preset="exact", base="int8", per_device_train_batch_size=1))
    fused, threshold = ({key(way): way.peak_bytes for way in one.ways} for one in found)
    assert threshold == pytest.approx(fused, rel=1e-6)


def test_experts_are_one_line():
    with pytest.raises(CELoraError, match="mixtures of experts are not estimated for GPUs"):
        count(None, None, AutoConfig.for_model("mixtral"), torch.bfloat16, int8=False)


def test_inputs_in_8_bits_keep_less_and_bases_in_8_bits_are_smaller(ask, inputs, tmp_path):
    ways = {
        (way.base, way.preset): way
        for way in ask(gradient_checkpointing=False, per_device_train_batch_size=8, dtype="bfloat16").ways
    }
    assert ways["int8", "fast"].peak_bytes < ways["int8", "auto"].peak_bytes < ways["bfloat16", "auto"].peak_bytes


def test_it_does_not_matter_that_this_cpu_has_no_8_bit_products_of_torch(ask, monkeypatch):
    """Kept below VNNI, oneDNN's sums overflow, so a base in 8 bits is not multiplied with its own bytes here."""
    found = []
    for said in ("", "is wrong on this device"):
        patch_all(monkeypatch, "celora.kernels.plain:wrong_integers", lambda device, said=said: said)
        found.append({key(way): way.peak_bytes for way in ask(preset="fast").ways})
    assert found[0] == found[1]


def test_fast_has_a_copy_of_the_head_in_8_bits(ask, monkeypatch):
    costs = {}

    def counted(request, *given, **more):
        costs[request.preset] = count(request, *given, **more)
        return costs[request.preset]

    patch_all(monkeypatch, "celora.train.forecast.blocks:count", counted)
    ask(base="int8", per_device_train_batch_size=1)
    assert {preset: cost.head_in_8_bits for preset, cost in costs.items()} == {"auto": False, "fast": True}


def test_the_gpu_of_this_machine_is_found_by_its_name(ask, monkeypatch):
    patch_all(monkeypatch, "celora.train.forecast.gpu:accelerator", lambda: torch.device("cuda"))
    patch_all(monkeypatch, "celora.train.forecast.gpu:device_name", lambda device: "NVIDIA GeForce RTX 4090")
    memory = SimpleNamespace(total_memory=int(23.6 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    patch_all(monkeypatch, "celora.train.forecast.estimate:available_memory", lambda device: 7 * 2**30)
    found = ask(gpu=None, preset="exact", use_cpu=False)
    assert (found.gpu, found.memory) == ("RTX 4090", 7 * 2**30)
    assert ask(gpu=None, preset="exact", use_cpu=True, dtype="float32", base="int8").gpu is None
    patch_all(monkeypatch, "celora.train.forecast.gpu:accelerator", lambda: torch.device("mps"))
    with pytest.raises(CELoraError, match="of CPUs and NVIDIA's GPUs, and this run would be on mps; give --use_cpu"):
        ask(gpu=None, preset="exact", use_cpu=False)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--gpu", "Voodoo 2"], "nothing is known of a GPU 'Voodoo 2', only of RTX 3050 6GB, "),
        (
            ["--gpu", "H100", "--preset", "paper"],
            "GPUs are estimated with preset off, exact, auto, fast, not with paper",
        ),
    ],
)
def test_what_is_not_known_is_one_line(more, said, inputs, capsys):
    assert main(["estimate", "--model", inputs["model"], "--data", inputs["data"], *more]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_json_names_the_gpu(inputs, capsys):
    command = ["estimate", "--model", inputs["model"], "--data", inputs["data"], "--preset", "exact", "--gpu", "L4"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpu"], found["memory"]) == ("L4", 22 * 2**30)
    assert {"smallest_gpu_gb", "fits", "peak_bytes", "epoch_seconds"} <= found["ways"][0].keys()
