"""The saga engine: straight lists of steps, each with its undo, on a durable log. Knows no sandbox and no model.

``definition`` says what a saga is, ``log`` what is remembered of one, ``executor`` runs, unwinds and recovers them.
``lifecycle`` defines the sagas and ``db`` keeps the log; this room imports neither and performs no input or output.
"""
