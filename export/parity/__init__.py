"""Compares a bundle with PyTorch: references, subgraphs, and the search for the block
where drift begins.
"""
