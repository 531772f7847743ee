"""The command line: parse, print, exit status.

Belongs here: options, help texts, printing. Does not belong here: work. May import: everything."""
