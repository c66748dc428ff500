"""The program inside the VM. Standard library and ``guest_protocol`` only: it runs on the tools image's own Python."""
