"""Passes that observe and decide; they write artifacts and leave the graph alone."""
