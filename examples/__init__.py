"""Programs that show the project at work; each runs from the repository's root."""
