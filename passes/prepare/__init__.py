"""Passes that clean a graph: the function stays, later passes find one spelling."""
