"""How a frozen weight is stored and read: plain, quantised, sharded.

Belongs here: reading all of a weight or some of its rows. Does not belong here: what is multiplied with it.
May import: errors, files, borrowed, machine."""
