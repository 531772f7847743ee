"""The training application: data, run, checkpoints and report, built on TRL's SFTTrainer."""
