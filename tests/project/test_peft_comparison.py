"""`benchmarks/peft_comparison.py` on a small stand-in for PEFT's script, which needs a GPU and a model of 3B."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig

from benchmarks import peft_comparison
from machine import refuses
from patching import patch_all

EXPERIMENT = "lora/llama-3.2-3B-rank32"
UTILS = "from peft import get_peft_model\n"
# What PEFT's script does to a model. It evaluates in inference mode, before training and between steps. Batches are
# padded on the right, and the first padding token has a label. The number of items, a Python number, leaves it out.
RUN = """
import argparse, json, os, sys
import torch
from peft import PeftConfig
from small import make_base, make_batch
from utils import get_peft_model

parser = argparse.ArgumentParser()
parser.add_argument("-v", "--verbose", action="store_true")
parser.add_argument("path_experiment")
args = parser.parse_args()
assert args.verbose and len(args.path_experiment.split(os.path.sep)) == 3

torch.manual_seed(0)
model = get_peft_model(make_base(), PeftConfig.from_pretrained(args.path_experiment), autocast_adapter_dtype=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
found = {"logits": [], "losses": [], "gradients": []}

def evaluate():
    model.eval()
    with torch.inference_mode():
        tokens = make_batch(9)["input_ids"]
        found["logits"].append(model(tokens).logits.norm().item())
        model.generate(input_ids=tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.train()

with model.disable_adapter():
    evaluate()
for step in range(2):
    batch = make_batch(step)
    batch["attention_mask"] = torch.ones(3, 11, dtype=torch.long)
    for i, length in enumerate((11, 8, 5)):
        batch["attention_mask"][i, length:] = 0
        batch["labels"][i, length + 1 :] = -100
    optimizer.zero_grad()
    output = model(**batch, num_items_in_batch=batch["attention_mask"].sum().item())
    output.loss.backward()
    found["losses"].append(output.loss.item())
    found["gradients"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
    optimizer.step()
    evaluate()
status, message = ("canceled", "it broke") if "-broken" in args.path_experiment else ("success", "")
result = {"run_info": {"error_msg": message}, "train_info": {"status": status}, "found": found}
result["without logits"] = output.logits is None
if "-silent" not in args.path_experiment:
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "temporary_results", "one.json"), "w") as file:
        json.dump(result, file)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(peft_comparison, "branch_of_peft", lambda: "HEAD")
    (tmp_path / "run.py").write_text(RUN, encoding="utf-8")
    (tmp_path / "utils.py").write_text(UTILS, encoding="utf-8")
    (tmp_path / "temporary_results").mkdir()
    for end in ("", "-broken", "-silent"):
        LoraConfig(r=4, task_type="CAUSAL_LM").save_pretrained(tmp_path / "experiments" / (EXPERIMENT + end))
    yield tmp_path
    sys.modules.pop("utils", None)


def results(folder: Path, preset: str) -> dict[str, Any]:
    peft_comparison.main([str(folder), "--preset", preset])
    sys.modules.pop("utils")
    (file,) = (folder / "temporary_results").iterdir()
    return json.loads(file.read_text(encoding="utf-8"))


def test_their_script_runs_with_celora_and_without(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, arguments, path, own = Path.cwd(), sys.argv, sys.path, peft.get_peft_model
    off = results(folder, "off")
    said = capsys.readouterr().out
    assert "celora is not attached." in said
    assert "frozen layers" not in said
    assert not off["without logits"]

    exact = results(folder, "exact")
    said = capsys.readouterr().out
    assert "preset exact:\nlayers" in said
    assert "None of 4 frozen layers estimated" in said  # q_proj and v_proj in two blocks
    assert "Padding left out" in said
    assert said.splitlines()[-1] == f"Preset exact: {folder / 'temporary_results' / 'one.json'}"
    assert exact["without logits"]
    for name, values in off["found"].items():
        assert exact["found"][name] == pytest.approx(values, rel=1e-4), name
    assert (Path.cwd(), sys.argv, sys.path, peft.get_peft_model) == (here, arguments, path, own)


@pytest.mark.filterwarnings("ignore:celora. (at step|from step)")
@pytest.mark.parametrize("preset", ["auto", "fast"])
def test_presets_that_estimate(
    folder: Path, preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ratios(calls: Mapping[str, object], **_: object) -> dict[str, float]:
        return {name: 0.1 if place else 1.0 for place, name in enumerate(calls)}  # the first is exact

    patch_all(monkeypatch, "celora.machine.timing:ratios", ratios)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert results(folder, preset)["without logits"]
    said = capsys.readouterr().out
    assert f"preset {preset}:\nlayers" in said
    if not refuses():
        assert "4 of 4 frozen layers estimated" in said


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    with pytest.raises(SystemExit) as ended:
        peft_comparison.main(arguments)
    assert ended.value.code == status
    return capsys.readouterr().err


def test_what_cannot_run_is_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = folder / "nowhere"
    said = refused(capsys, str(nowhere))
    assert said.startswith(f"no run.py in {nowhere}; give the folder method_comparison/MetaMathQA")
    assert said.count("\n") == 1

    (folder / "experiments" / "full" / "lr").mkdir(parents=True)  # no adapter: a full fine-tuning
    for name in ("lora/llama", "lora", "full/lr"):
        said = refused(capsys, str(folder), name)
        assert said.startswith(f"experiment {name!r} has no adapter_config.json; expected METHOD/NAME")
        assert said.count("\n") == 1

    for branch, why in (("main", "on main branch of Git, where run.py overwrites"), ("", "on no branch of Git")):
        monkeypatch.setattr(peft_comparison, "branch_of_peft", lambda branch=branch: branch)
        said = refused(capsys, str(folder))
        assert why in said
        assert said.count("\n") == 1

    (folder / "utils.py").write_text("import peft\n", encoding="utf-8")
    said = refused(capsys, str(folder), f"experiments/{EXPERIMENT}/")
    assert "has 'from peft import get_peft_model', so celora cannot attach" in said
    assert said.count("\n") == 1


def test_what_celora_cannot_attach_to_is_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    other.save_pretrained(folder / "experiments" / "prompt" / "small")
    said = refused(capsys, str(folder), "prompt/small")
    assert said.startswith("PROMPT_TUNING adapts no layer")
    assert said.count("\n") == 1


def test_a_run_without_a_good_result_has_status_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, str(folder), f"{EXPERIMENT}-broken", status=1) == "run.py's status: canceled. it broke\n"
    sys.modules.pop("utils")
    assert refused(capsys, str(folder), f"{EXPERIMENT}-silent", status=1) == "run.py wrote no result.\n"


def test_the_branch_of_peft_is_git_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert peft_comparison.branch_of_peft() == ""
    for command in (["init", "-q", "-b", "mine"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        named = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *named, *command], cwd=tmp_path, check=True)
    assert peft_comparison.branch_of_peft() == "mine"
