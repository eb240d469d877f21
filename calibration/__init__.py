"""Calibration: runs a checkpoint block by block on real samples, and derives ranges,
scales, rounding and sensitivity from the results.
"""
