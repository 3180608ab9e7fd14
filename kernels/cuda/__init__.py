"""The backend of NVIDIA's GPUs: kernels in CUDA C++, compiled when first needed, and the host side of them."""
