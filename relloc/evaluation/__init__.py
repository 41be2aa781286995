"""What every evaluation declares and is given, and the runner that computes what several of them share once."""
