"""What this machine has, whether it can run a target, and for everything that does not
fit its cause and its fix. Torch-free.
"""
