"""Bodies of the HTTP API, as pydantic models: the contract between manager and clients.

Imported by api and client; nothing here knows a database, a driver or a web framework.
"""
