"""Checkpoint → bundle. Import the parts: nothing heavy is loaded here."""
