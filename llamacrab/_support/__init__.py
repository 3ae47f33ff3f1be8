"""Helpers for all parts: files, optional packages, the machine, versions."""
