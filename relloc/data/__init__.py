"""Images: where they come from, how they are read, in which order."""
