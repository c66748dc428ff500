"""The command line, ``atelier``: commands and rendering. Reaches the manager through ``atelier.client`` only."""
