"""One file per command. At import they may load click and nothing slower; the rest is imported when they run."""
