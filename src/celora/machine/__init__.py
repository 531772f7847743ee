"""What this computer is and does: CPU features, device names, time, memory, threads, processes.

Belongs here: whatever asks the operating system, torch's device API or torch.distributed. Does not belong here:
anything that knows a layer, a model or a setting. May import: errors, files, borrowed."""
