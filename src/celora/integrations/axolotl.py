"""celora in axolotl: a plugin, which two lines of its YAML file name.

    plugins: [celora.integrations.axolotl.CeloraPlugin]
    celora: exact

This module needs axolotl.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from celora.errors import CELoraError
from celora.integrations import default_preset
from celora.integrations.while_training import AttachWhileTraining

# axolotl turns them on if nothing is said of them. They read the layers' weights, and do not call the layers.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class CeloraArgs(BaseModel):  # type: ignore[misc]
    """The key that celora adds to axolotl's YAML file: a preset or a mapping, as `AttachWhileTraining` takes it."""

    celora: Any = None


class CeloraPlugin(BasePlugin):  # type: ignore[misc]
    """Attaches celora to the model that axolotl trains, from the beginning of the training to its end.

    Turns axolotl's own LoRA kernels off where the file says nothing of them.

    Raises:
        CELoraError: the file turns one of these kernels on, or its `celora:` has an unknown preset or field.
    """

    def get_input_args(self) -> str:
        """The name of the class with our key, which axolotl adds to those that it checks."""
        return f"{__name__}.{CeloraArgs.__name__}"

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        """Check the file's settings before axolotl does."""
        _callback(cfg)
        for name in KERNELS:
            if cfg.get(name):
                raise CELoraError(
                    f"{name}: {cfg[name]}; axolotl's kernel computes past the layers that celora attaches to. "
                    "Leave it out, or train without celora's plugin."
                )
            cfg[name] = False

    def add_callbacks_pre_trainer(self, cfg: MutableMapping[str, Any], model: object) -> list[AttachWhileTraining]:
        """The callback for axolotl's trainer."""
        return [_callback(cfg)]


def _callback(cfg: MutableMapping[str, Any]) -> AttachWhileTraining:
    asked = cfg.get("celora")
    return AttachWhileTraining(default_preset() if asked is None else asked)
