"""The mathematics: what is estimated, and how. On torch and `kernels` alone.

Belongs here: formulas and their reference twins. Does not belong here: modules, hooks, optimizers.
May import: everything above it, down to kernels."""
