"""What host and guest say to each other: messages, framing, versions. Standard library only.

Imported by the guest agent inside the VM and by gateway and guest driver on the host.
"""

PROTOCOL_VERSION = 2
"""Version of the guest protocol. The host speaks this one and the one before it, in which a stream's
full window was smaller."""

GUEST_AGENT_PORT = 49983
"""The guest port whose streams the agent takes itself; every other port is one of the guest's own servers."""

GUEST_CHANNEL_VSOCK_PORT = 49983
"""Where the agent takes the guest channel itself, on a machine that has vsock in place of a virtio-serial port."""

GUEST_SSH_PORT = 49984
"""The guest port whose streams the agent gives an sshd each. A stream begins with a line: the public key that it trusts."""
