"""Rounding and transform maths: arrays in, arrays out, no graph."""
