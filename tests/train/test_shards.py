"""Saves weights to a folder in as many files as asked for, reads them back, and saves none if one is not finite."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from celora.errors import CELoraError
from celora.files import replacing_folder
from celora.train.formats import shards
from celora.train.formats.shards import write_shards

TENSORS = {f"t{i}": torch.randn(10, 10, generator=torch.Generator().manual_seed(i)) for i in range(5)}


def test_one_file_needs_no_index(tmp_path):
    assert write_shards(tmp_path, iter(TENSORS.items()), 10_000) == set(TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_files_and_their_index(tmp_path):
    write_shards(tmp_path, iter(TENSORS.items()), 900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    read = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_what_is_not_finite_is_named(tmp_path):
    with pytest.raises(CELoraError, match="'bad' holds NaN or infinity, so nothing is written"):
        write_shards(tmp_path, iter([("bad", torch.tensor([1.0, float("nan")]))]), 900)


def test_what_reads_back_otherwise_is_said(tmp_path, monkeypatch):
    plain = shards.save_file
    monkeypatch.setattr(shards, "save_file", lambda group, *rest, **more: plain(
        {name: tensor + 1 for name, tensor in group.items()}, *rest, **more
    ))  # fmt: skip
    with pytest.raises(CELoraError, match="does not read back as it was written; check the disk"):
        write_shards(tmp_path, iter(TENSORS.items()), 900)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """safetensors raises an error of its own, which is no OSError."""

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)

    def write():
        with replacing_folder(tmp_path / "made") as new:
            write_shards(new, iter(TENSORS.items()), 900)

    with pytest.raises(CELoraError, match=r"cannot write '.*made': .* No space left on device .*; what was there"):
        write()
    assert list(tmp_path.iterdir()) == []
