"""The manager: one process with the API, the database and the lifecycle. Control plane only."""
