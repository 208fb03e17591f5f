"""One module an operator; each has ``OPERATOR``. Loaded by name through the registry."""
