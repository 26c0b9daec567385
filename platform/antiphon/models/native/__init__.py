"""The decode kernels in C++ (kernels.cpp), and whether this process has them (hot kernels, control-speed loading)."""
