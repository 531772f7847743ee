"""The mathematics: what is estimated, and how.

Belongs here: formulas and their reference twins. Does not belong here: modules, hooks, optimizers.
May import: everything down to kernels."""
