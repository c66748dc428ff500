"""The database: SQLite through SQLAlchemy Core, one file per aggregate, the saga log and the outbox.

Called by ``lifecycle`` and ``services``, for which ``Connection`` is an opaque thing to hand on. No other room imports
SQLAlchemy. No transaction is open while a driver works: reads are short and without ``await``, writes are functions.
"""
