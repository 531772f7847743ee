"""Files of other programs: llama.cpp's GGUF, MLX's adapters, and merged models for Transformers.

Belongs here: names, order and storage of tensors, and writing them whole. Does not belong here: training.
"""
