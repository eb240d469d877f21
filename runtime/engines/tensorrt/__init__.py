"""TensorRT without torch: engines built on this machine from a bundle's graphs, kept
under a fingerprint, tried on the bundle's goldens, and run.
"""
