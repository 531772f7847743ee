"""How a frozen weight is stored and read: plain, quantised, sharded.

Belongs here: reading a whole weight or some of its rows. Does not belong here: multiplying.
May import: errors, files, borrowed, machine."""
