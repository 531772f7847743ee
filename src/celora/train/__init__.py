"""The training application, built on TRL's SFTTrainer: it reads rows, trains, saves checkpoints and writes a report."""
