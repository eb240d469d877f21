"""Calibration: ranges and sensitivities measured on real samples. The int8 scheme of today needs none; its activations are scaled as they occur."""
