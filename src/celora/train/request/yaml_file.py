"""Reads the file behind --config: a mapping of names to values, and environment variables under `env`.

`trl sft` reads such files, too. Like it, the command line sets the variables under `env`. It does so before it imports
torch, because some variables only count at that moment. `arguments` decides what the names mean.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml

from celora.errors import CELoraError
from celora.files import check_regular

# The variables that `env` may set. Others decide which code runs or where data and passwords go (PATH, LD_PRELOAD,
# PYTHONPATH, HF_ENDPOINT, HF_HOME, WANDB_BASE_URL, NCCL_NET_PLUGIN). Set those in the shell.
ENVIRONMENT = frozenset({
    # devices, memory and numbers
    "ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
    "FLASH_ATTENTION_DETERMINISTIC", "TORCHDYNAMO_DISABLE", "CELORA_KERNELS",
    # threads and processes
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL",
    "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_AVOID_RECORD_STREAMS",
    # the hub, and how much libraries print
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY",
    "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_ENABLE_HF_TRANSFER", "HF_XET_HIGH_PERFORMANCE",
    "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "TRANSFORMERS_VERBOSITY",
    "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "BITSANDBYTES_NOWELCOME",
    "TRL_EXPERIMENTAL_SILENCE",
    # how a reporter names a run
    "COMET_MODE", "COMET_PROJECT_NAME", "COMET_WORKSPACE", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TAGS",
    "TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "WANDB_CONSOLE", "WANDB_DISABLED", "WANDB_ENTITY", "WANDB_JOB_TYPE",
    "WANDB_LOG_MODEL", "WANDB_MODE", "WANDB_NAME", "WANDB_NOTES", "WANDB_PROJECT", "WANDB_RESUME",
    "WANDB_RUN_GROUP", "WANDB_RUN_ID", "WANDB_SILENT", "WANDB_TAGS", "WANDB_WATCH",
})  # fmt: skip
_MOST_VALUES = 10_000  # in a configuration file; YAML aliases of aliases could expand to billions


def read_document(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, without `env`. An empty file gives an empty mapping."""
    document = _parse(path)
    document.pop("env", None)
    return document


def set_environment(path: str | Path) -> None:
    """Set the environment variables that the file lists under `env`: all of them or, on an error, none.

    Raises:
        CELoraError: a variable is not in `ENVIRONMENT`, or its value is neither text nor a number.
    """
    asked, where = _parse(path).get("env") or {}, f"env in --config {str(path)!r}"
    if not isinstance(asked, dict):
        raise CELoraError(f"{where} is {asked!r}; expected a mapping of variables to values")
    for name, value in asked.items():
        if name not in ENVIRONMENT:
            raise CELoraError(
                f"{where}: {name!r} is not set from a file, which could change what code runs or where data goes; "
                f"set it in the shell{_nearest(name)}"
            )
        text = value if isinstance(value, str) else ""
        if not isinstance(value, str | int | float) or "\0" in text or re.search("[\ud800-\udfff]", text):
            raise CELoraError(f"{where}: {name} is {value!r}; expected text or a number")
    os.environ.update({name: str(value) for name, value in asked.items()})


def _nearest(name: object) -> str:
    near = difflib.get_close_matches(str(name), ENVIRONMENT, n=1, cutoff=0.8)
    return f", or did you mean {near[0]}?" if near else "."


class _Strict(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice: which one counts would be a guess."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Like PyYAML's, with the check. Keys merged in with `<<` are not checked: merging happens later."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value!r} comes twice in one mapping"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def _parse(path: str | Path) -> dict[str, Any]:
    check_regular(Path(path))
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Strict)
    except OSError as error:
        raise CELoraError(f"cannot read --config {str(path)!r}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CELoraError(f"--config {str(path)!r} is not UTF-8 text; save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date like 2001-99-99
        raise CELoraError(f"--config {str(path)!r} is not valid YAML: {error}") from None
    if document is None:
        return {}
    if _larger(document, _MOST_VALUES):
        raise CELoraError(f"--config {str(path)!r} expands to more than {_MOST_VALUES:,} values; expected settings")
    if not isinstance(document, dict):
        raise CELoraError(
            f"--config {str(path)!r} holds a {type(document).__name__}; expected a mapping of names to values"
        )
    return document


def _larger(value: object, most: int) -> bool:
    """Whether a document has more than `most` values, counting a value once for each alias of it."""
    rest = [value]
    while rest and most >= 0:
        inner = rest.pop()
        rest += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
        most -= 1
    return most < 0
