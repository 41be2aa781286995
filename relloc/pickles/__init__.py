"""Reads pickles, and files of torch.save, from other projects without running anything in them."""
