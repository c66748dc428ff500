"""Questions to this machine, each with an answer in words and a remedy; for ``atelier doctor`` and, later, root's."""
