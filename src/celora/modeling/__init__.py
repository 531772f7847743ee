"""What is put onto a model, and how a model is recognised.

Start with `survey`, which says what is found in a model, and `families`, which says what is known beforehand.

Belongs here: hooks, grafts, recognition of layers, heads and families. Does not belong here: optimizer steps and
refreshes, audits and the gate (`runtime`). May import: everything down to settings."""
