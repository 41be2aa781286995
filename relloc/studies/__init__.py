"""Studies of what a network sees: pictures, tables and numbers of a backbone on any images."""
