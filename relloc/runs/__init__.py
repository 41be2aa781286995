"""What the commands do, from a composed config to a finished run folder: the only users of Hydra."""
