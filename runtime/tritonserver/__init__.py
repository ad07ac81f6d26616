"""Triton Inference Server: its program, its repository, and the models in it."""
