"""C++ for bf16 on CPUs with AVX512-BF16: kernels.cpp, and build.py, which compiles and calls it."""
