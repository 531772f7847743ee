"""TRL's classes whose fields are flags of `celora train`."""

from __future__ import annotations

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

TRL_SFT = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
