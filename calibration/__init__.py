"""Calibration: a checkpoint run block by block on real samples, and what its blocks say
about ranges, scales, rounding and sensitivity.
"""
