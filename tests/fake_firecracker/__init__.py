"""A Firecracker and a jailer that run no machine, as programs of their own, held to the vendor's API document."""
