"""The model as a graph: files, typed matches, safe edits."""
