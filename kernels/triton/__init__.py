"""The backend of any GPU that Triton serves: the host side, and the kernels in files of their own, imported at a launch."""
