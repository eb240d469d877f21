"""The latency report: measures answers on this machine, stores the raw times, shows
them, and compares two reports.
"""
