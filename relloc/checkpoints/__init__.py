"""Files of weights and training states: our own, those of other projects, and the names that each gives its weights."""
