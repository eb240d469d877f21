"""Planted faults: a table of wrong bundles and wrong runtimes that the proof must refuse."""
