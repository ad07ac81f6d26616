"""bundle → answers."""
