"""Gives each sandbox its network slot."""
