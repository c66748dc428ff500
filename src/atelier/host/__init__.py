"""The only door to the kernel: commands, processes, files, privileges.

Drivers and programs come through here; nothing else in the manager or gateway starts a process, calls into a C library
or locks a file. This room knows no sandbox.
"""
