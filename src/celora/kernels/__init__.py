"""Operations by name. `operations` decides which backend runs each: C, oneDNN, Triton or torch's operators.

Belongs here: passes over numbers that know nothing of layers. Does not belong here: what is estimated, and when.
May import: errors, files, borrowed, machine, weights."""

from celora.kernels import operations  # it fills the table of `backends`

__all__ = ["operations"]
