"""Speaks with guest agents over the guest channel."""
