"""The library needs torch, Transformers, PEFT and safetensors alone. The extra `app` is for the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from house import ROOMS, imported, modules, room
from lowest import lowest
from variants import OTHERS

ROOT = Path(__file__).parents[2]
LIBRARY = ROOMS[: ROOMS.index("train")]
# They bring something of their own, and are imported only where a user has installed them.
OPTIONAL = {"bitsandbytes", "flash_attn", "triton", "axolotl", "pydantic", "llamafactory"}  # axolotl brings pydantic
NEED_MORE = {"celora.kernels.triton.jitted", "celora.integrations.axolotl"}
# Packages of the application that torch, Transformers and PEFT import themselves.
OF_OTHERS = {"accelerate", "filelock", "yaml"}
OF_PEFT = {"psutil"}
OF_TRANSFORMERS = {"typer", "rich"}  # in most versions; `celora doctor` needs no more
ALONE = """
import importlib, sys
for name in {blocked!r}:
    sys.modules[name] = None
import torch
import celora, celora.fsdp
from small import make_batch, make_model

for name in {modules!r}:
    importlib.import_module(name)
model, batches = make_model(r=4).train(), [make_batch(seed) for seed in range(2)]
celora.attach(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
model(**batches[0]).loss.backward()
optimizer.step()
print(celora.audit(model, batches[0]))
celora.detach(model)
print(celora.quantise_base(model))
celora.attach(model, "exact")
model(**batches[0]).loss.backward()
celora.Callback()
for name in {brought!r}:
    del sys.modules[name]
from celora.cli.main import main
assert main(["doctor", "--quiet"]) == 0
print("done")
"""


def test_the_library_imports_what_it_declares() -> None:
    names = {name for module, path in modules().items() if room(module) in LIBRARY for name in imported(path)}
    found = {name.partition(".")[0] for name in names} - {"celora", *sys.stdlib_module_names}
    assert found - OPTIONAL - OF_PEFT == set(lowest()) == {"torch", "transformers", "peft", "safetensors"}
    assert {Requirement(need).name for need in metadata.requires("peft") if "extra ==" not in need} >= OF_PEFT


def test_the_library_works_without_the_application() -> None:
    blocked = {"yaml" if name == "pyyaml" else name for name in lowest("app")} - {*lowest(), *OF_OTHERS}
    assert {"trl", "datasets", "typer", "rich", "plotly", "pyarrow", "gguf"} == blocked
    own = [name for name in modules() if room(name) in LIBRARY and name not in NEED_MORE]
    script = ALONE.format(blocked=sorted(blocked), modules=sorted(own), brought=sorted(OF_TRANSFORMERS))
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "LoRA gradient, estimated against exact" in done.stdout
    assert "14 frozen linear layers in 8 bits" in done.stdout
    assert done.stdout.endswith("done\n")


def test_the_library_takes_what_other_programs_pin() -> None:
    """`pip install celora` beside them changes no version. OTHERS are those that their newest releases allow."""
    declared = [Requirement(f"{name}>={version}") for name, version in lowest().items()]
    for name, versions in OTHERS.items():
        assert [need.name for need in declared if not need.specifier.contains(versions[need.name])] == [], name
