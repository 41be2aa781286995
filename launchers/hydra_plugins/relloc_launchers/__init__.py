"""Hydra launchers of relloc: sweeps as processes of this machine, or as jobs of SLURM."""
