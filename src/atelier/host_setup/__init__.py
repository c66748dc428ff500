"""What root does for Atelier on a production host: the privileged helper program, and what it takes to have it."""
