"""The output folder: checkpoints, seals and what is saved."""
