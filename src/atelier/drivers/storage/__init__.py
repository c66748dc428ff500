"""Makes and removes the root volumes of sandboxes."""
