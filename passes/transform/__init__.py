"""Passes that keep the function and make it easier to quantize."""
