"""Describes a finished bundle as text, JSON or an HTML page."""
