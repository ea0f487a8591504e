"""Triton kernels: each has a slow twin in plain torch and a test that joins them.

They know tensors and nothing of sequences, trees or tasks. Whatever changes from step to step is
read from device tensors, so that every launch can be captured in a CUDA graph. Importing a module
of this package imports Triton.
"""
