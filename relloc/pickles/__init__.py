"""Reading pickles of other projects, and torch.save's files, without running anything that is in them."""
