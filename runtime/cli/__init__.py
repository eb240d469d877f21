"""The command `infmllm-run`."""
