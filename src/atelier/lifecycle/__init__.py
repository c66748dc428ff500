"""The sagas of sandboxes and the one function that applies transitions. Called by services and the manager's loops."""
