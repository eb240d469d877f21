"""Reads the machine's hardware: processor, memory, GPU, power and thermal sensors."""
