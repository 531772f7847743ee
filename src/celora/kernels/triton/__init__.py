"""Kernels for NVIDIA GPUs, written in Triton, which is imported when a CUDA tensor first asks for one of them.

They were proved without a GPU: in Triton's interpreter, and by compiling them. So no GPU uses one until `judge` has
found it right and faster than torch on that very GPU (`judged`)."""
