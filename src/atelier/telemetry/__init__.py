"""Logs and the context that goes with each line. Used by every room above; knows none of them."""
