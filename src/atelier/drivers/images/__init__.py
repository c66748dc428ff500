"""Builds and finds images, kernel, initramfs and tools image."""
