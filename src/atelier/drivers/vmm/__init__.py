"""Starts and ends virtual machines."""
