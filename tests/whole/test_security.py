"""Files are only read: no code runs, nothing is unpickled, and no path leaves the given folders."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import celora
from celora.errors import CELoraError
from celora.files import write_json
from celora.train.loading import load_adapter, load_model
from celora.train.output.folder import RUN, OutputFolder
from celora.train.output.manifest import MANIFEST, read_manifest, seal
from celora.train.request.arguments import make_request, parse, read_yaml
from celora.train.request.yaml_file import _Strict
from celora.train.rows.data import load_rows
from runs import go

SOURCE = Path(celora.__file__).parent
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


class Boom:
    """Leaves a file if it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


STARTS_SCRIPTS = SOURCE / "integrations" / "script.py"  # the script that a user names, as Python itself would


def test_the_source_runs_no_code_that_it_reads():
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not names & FORBIDDEN or ast.unparse(node) == "from pickle import UnpicklingError", file
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                runs = ("eval", "torch.save", "os.system", *(() if file == STARTS_SCRIPTS else ("exec", "compile")))
                assert name not in runs, (file, name)
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                # Without this option, transformers asks on the terminal. These have no such option, and run no code.
                loads = name.endswith((".from_pretrained", ".from_config")) and not name.startswith(
                    ("Peft", "LoraConfig", "GenerationConfig")
                )
                assert keywords.get("trust_remote_code", "" if loads else "False") == "False", (file, name)
                assert keywords.get("shell", "False") == "False", file
                assert name != "yaml.load" or (keywords["Loader"] == "_Strict" and issubclass(_Strict, yaml.SafeLoader))
                assert name != "torch.load" or keywords.get("weights_only") == "True", file


def test_code_of_models_never_runs(inputs, tmp_path):
    given = {"model": "m", "data": "d", "output": "o"}
    with pytest.raises(CELoraError, match=r"trust_remote_code.* is refused"):
        parse(["--trust_remote_code"], given)
    with pytest.raises(CELoraError, match=r"trust_remote_code.* is refused"):
        make_request({**given, "trust_remote_code": True})
    with pytest.raises(CELoraError, match=r"trust_remote_code.* is refused"):
        parse(["--model_init_kwargs", '{"trust_remote_code": true}'], given)


@pytest.mark.parametrize("where", ["tokenizer", "model"])
def test_nobody_is_asked_whether_code_may_run(where, inputs, tmp_path, monkeypatch):
    folder = shutil.copytree(inputs["model"], tmp_path / "model")
    name, change = "config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C"}}
    if where != "model":
        name, change = (
            "tokenizer_config.json",
            {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}},
        )
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    given = inputs | {"model": str(folder)}
    with pytest.raises(CELoraError, match=r"code|T\b") as caught:
        go(given, tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(CELoraError, match="code"):
        load_model(make_request({**given, "output": "o"})) if where == "model" else go(given, tmp_path / "out")
    assert sys.stdin.tell() == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "init",
    [
        {"weights_only": False},
        {"use_safetensors": False},
        {"use_kernels": True, "allow_all_kernels": True},
        {"attn_implementation": "someone/kernel"},
        {"attn_implementation": "flash|someone/kernel"},
        {"proxies": {"https": "someone"}},
        {"config": "/elsewhere"},
        {"quantization_config": {}},
        {"code_revision": "main"},
    ],
)
def test_what_model_init_kwargs_may_not_hold(init):
    with pytest.raises(CELoraError, match=r"unknown name in model_init_kwargs|is refused: it names code on the hub"):
        make_request({"model": "m", "data": "d", "output": "o", "model_init_kwargs": init})


def test_what_transformers_says_of_model_init_kwargs_is_one_line(inputs):
    given = {**inputs, "output": "o"}
    assert load_model(make_request({**given, "model_init_kwargs": {"use_cache": False}})).config.use_cache is False
    for init in ({"device_map": [1]}, {"rope_scaling": "x"}, {"variant": "none"}, {"experts_implementation": "a/b"}):
        with pytest.raises(CELoraError, match="cannot load a model") as caught:
            load_model(make_request({**given, "model_init_kwargs": init}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [touch ran]",
        "celora: !!python/name:os.system",
        "max_steps: 2001-99-99",
        "[" * 50_000,
        "&a [*a]",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
        "\x00",
        "? [a]\n: b",
    ],
)
def test_configuration_files_are_data(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(CELoraError) as caught:
        read_yaml(tmp_path / "run.yaml")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_pickles_are_not_unpickled(inputs, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    payload = pickle.dumps(Boom(ran))
    for name in ("data.jsonl", "data.csv", "data.parquet"):
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(CELoraError, match=name):
            load_rows(tmp_path / name, chat=False, cache_dir=tmp_path / "cache")
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(inputs["model"]).iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    torch.save({"weight": Boom(ran)}, model / "pytorch_model.bin")
    with pytest.raises(
        CELoraError, match=r"holds pytorch_model\.bin, a pickle, and no \.safetensors: .* never unpickled"
    ):
        go({**inputs, "model": str(model)}, tmp_path / "out")
    (model / "other.safetensors").write_bytes(b"")  # the file does not change what transformers looks for
    with pytest.raises(CELoraError, match=r"cannot load a model .*no file named model\.safetensors"):
        go({**inputs, "model": str(model)}, tmp_path / "out")
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"weight": Boom(ran)}, tmp_path / "adapter_model.bin")
    with pytest.raises(
        CELoraError, match=r"has no adapter_model\.safetensors; an adapter_model\.bin, a pickle, is not"
    ):
        load_adapter(None, tmp_path)

    output = tmp_path / "run"
    go(inputs, output, max_steps=3)
    record = json.loads((output / "run.json").read_text())
    write_json(output / "run.json", record | {"status": "interrupted"})
    torch.save({"state": Boom(ran)}, output / "checkpoint-3" / "optimizer.pt")
    seal(output / "checkpoint-3", {"step": 3, "seconds": 1.0, "resumable": True})  # sealed by somebody who knows how
    with pytest.raises(CELoraError, match=r"the run stopped: .* never unpickled"):
        go(inputs, output, max_steps=6, resume=True)
    assert not ran.exists()


def test_what_runs_by_itself_may_only_read():
    """Jobs for every push and every night have no right beyond reading, no secrets, and no credentials in the clone.

    A release, which somebody starts with a tag, may also prove its identity to the index. It may do nothing else.
    """
    steps, publish = [], {"contents": "read", "id-token": "write", "attestations": "write"}
    for file in (Path(__file__).parents[2] / ".github" / "workflows").iterdir():
        text = file.read_text(encoding="utf-8")
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {"contents": "read"}
        release = file.name == "release.yml"
        assert not release or workflow[True] == {"push": {"tags": ["v*"]}}  # `on` is a truth value in YAML
        rights = [job["permissions"] for job in workflow["jobs"].values() if "permissions" in job]
        assert rights == ([publish] if release else [])
        assert not [job for job in workflow["jobs"].values() if "secrets" in job]
        assert "secrets." not in text
        steps += [step for job in workflow["jobs"].values() for step in job.get("steps", ())]
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout")]
    assert {step["with"]["persist-credentials"] for step in checkouts} == {False}
    commands = [step["run"] for step in steps if "run" in step]
    assert {".ci/run", "make test-lowest", "make test-newest", ".venv/bin/python -m pytest -m slow"} < set(commands)
    audit = next(command for command in commands if command.startswith("pip-audit"))
    assert {"--strict", "--requirement"} < set(audit.split())  # the file leaves out celora, which is on no index


def test_a_manifest_opens_nothing_outside_its_folder(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    seal(folder, {"step": 1})
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    manifest["sha256"]["../secret"] = hashlib.sha256(b"secret").hexdigest()
    manifest["manifest_sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CELoraError, match=r"\.\./secret is missing"):
        read_manifest(folder)


def test_links_are_not_followed_out_of_the_folder(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    folder.mkdir()
    (outside / "thesis.tex").write_text("years")
    seal(outside, {"step": 9, "seconds": 0.0, "resumable": True})
    write_json(folder / "run.json", {"celora": "0"})
    (folder / "checkpoint-9").symlink_to(outside)
    (folder / "metrics.jsonl").symlink_to(outside / "thesis.tex")
    ours = OutputFolder(folder)
    assert ours.last_checkpoint() is None
    ours.clear_after(0)
    ours.keep_last(1, ())
    ours.set_aside()
    ours.forget_earlier()
    assert (outside / "thesis.tex").read_text() == "years"
    assert (folder / "checkpoint-9").is_symlink()


@pytest.mark.parametrize("name", ["README.md", ".replaced", "_celora.lock", ".adapter.tmp", "metrics.jsonl", RUN])
def test_no_run_writes_through_a_link(name, inputs, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    folder.mkdir()
    (outside / "run.json").write_text('{"celora": "0", "given": {}, "train": {}, "lora": {}, "config": {}, "r": 8}')
    before = [(entry.name, entry.read_bytes()) for entry in outside.iterdir()]
    if name != RUN:
        write_json(folder / RUN, {"celora": "0"})
    (folder / name).symlink_to(outside if name == ".replaced" else outside / "run.json")
    for how in ("resume", "overwrite"):
        with pytest.raises(CELoraError, match="is a link, and a run would write through it"):
            go(inputs, folder, **{how: True})
    assert [(entry.name, entry.read_bytes()) for entry in outside.iterdir()] == before
    assert (folder / name).is_symlink()


def test_a_checkpoint_takes_the_place_of_a_link(inputs, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    folder.mkdir()
    (outside / "thesis.tex").write_text("years")
    write_json(folder / RUN, {"celora": "0"})
    for name in ("checkpoint-3", "checkpoint-6"):
        (folder / name).symlink_to(outside if name == "checkpoint-3" else tmp_path / "nowhere")
    go(inputs, folder, overwrite=True)
    assert OutputFolder(folder).last_checkpoint()[0].name == "checkpoint-6"
    assert not any(entry.is_symlink() for entry in folder.iterdir())
    assert [entry.name for entry in outside.iterdir()] == ["thesis.tex"]
