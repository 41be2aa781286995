"""Reads and writes files of weights and training states, including those of other projects."""
