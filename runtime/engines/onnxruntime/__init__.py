"""Engines on ONNX Runtime: the CPU, CUDA, and the TensorRT-RTX plugin."""
