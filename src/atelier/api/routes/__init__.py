"""One file per resource; each offers ``router``."""
