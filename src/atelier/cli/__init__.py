"""The command ``atelier``: options, rendering, and the user's terminal. Everything else is asked of the manager.

``__main__`` names the commands, each of which lies in ``commands/`` and is imported when it is called, so that
``--help`` answers at once. The manager is reached through ``client`` alone; ``up`` and ``doctor`` become the manager's
own program.
"""
