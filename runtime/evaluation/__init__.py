"""Scores answers against references, per task, and reports the result."""
