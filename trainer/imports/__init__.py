"""Bringing weights from elsewhere: published raw checkpoints and Hugging Face folders
become checkpoints of ours, strictly and shard by shard.
"""
