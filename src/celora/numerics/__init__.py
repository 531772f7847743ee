"""The mathematics: what is estimated, and how. It needs only torch and `kernels`.

Belongs here: formulas and their reference twins. Does not belong here: modules, hooks, optimizers.
May import: everything above it, down to kernels."""
