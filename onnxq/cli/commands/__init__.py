"""One file a command; the file's ``command`` is the click command."""
