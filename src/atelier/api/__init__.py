"""The HTTP edge of the manager: parses, calls one service, renders. No rule of the product lives here."""
