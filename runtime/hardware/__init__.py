"""Reads what machine this is: processor, memory, GPU, power and thermal sensors."""
