"""Identity providers: who vouches for the people that sign in."""
