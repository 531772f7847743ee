"""The C kernels: their sources, the compiler that builds them and the functions that call them."""
