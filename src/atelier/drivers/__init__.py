"""Adapters to what Atelier drives: one folder per kind, each with ``interface.py``, the real ones and ``fake.py``.

Kinds do not see each other. Only ``manager.wiring``, ``gateway`` and ``host_setup`` import a concrete driver; every
other room knows the interfaces alone. ``tests/contract/`` runs one suite per kind on the fake and every real driver.
"""
