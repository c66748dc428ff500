"""Typed settings: the only room that reads the process environment.

Programs load them once and hand values downward; no floor below imports this.
"""
