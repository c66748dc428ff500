"""The typed HTTP client of the manager, which is also the public Python SDK: ``from atelier import Sandbox``.

Used by the CLI and by other people's programs. What is sent and how answers are read is said once, without I/O, in
``calls.py``; ``connection.py`` sends it, blocking or on asyncio. Nothing here knows drivers, the database or settings.
"""
