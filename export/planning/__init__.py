"""Predicts disk, memory and latency before a build, and holds the limits of each kind
of build.
"""
