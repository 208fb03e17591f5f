"""Passes that round weights."""
