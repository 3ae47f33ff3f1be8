"""Requests: how the texts of a call become inputs, and how rows become its result."""
