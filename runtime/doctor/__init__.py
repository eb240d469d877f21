"""Diagnoses this machine: its hardware and software, which targets it can run, and the
cause and fix of every problem. Torch-free.
"""
