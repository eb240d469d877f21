"""TensorRT without torch: engines are built on this machine from a bundle's graphs,
cached under a fingerprint, validated on the bundle's goldens, and run.
"""
