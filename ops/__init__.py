"""The operations of the model, one a file: the definition, Triton kernels, C++ and PyTorch."""
