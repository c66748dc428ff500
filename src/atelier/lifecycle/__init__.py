"""Lifecycle: what happens to a sandbox from its first step to the removal of its last trace.

``sandboxes`` is the door that services and the manager use; ``sandbox_create`` holds the one list of steps; every change
of state goes through ``transitions``. Drivers are called by way of their interfaces only, never with a transaction open.
"""
