"""One file per figure, each with its bare baseline. ``scripts/bench`` runs them; nothing of Atelier imports them."""
