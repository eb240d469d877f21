"""The latency report: measuring answers on this machine, keeping the raw times, showing
them, and comparing two reports.
"""
