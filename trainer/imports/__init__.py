"""Imports weights: converts published raw checkpoints and Hugging Face folders to
InfMLLM checkpoints, strictly and shard by shard.
"""
