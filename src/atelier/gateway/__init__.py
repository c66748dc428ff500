"""The data plane's process: owns the guest channels and the sockets on which streams into a guest are opened."""
