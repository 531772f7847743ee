"""The output folder of a run: what is saved in it, and how checkpoints are kept whole."""
