"""What a run will take, before it begins: memory and time.

Belongs here: measuring a few blocks of the model, the arithmetic from there to the whole, and choosing. Does not belong
here: training. No weights are loaded.
"""
