"""The commands' work, from a composed config to a finished run folder.

Only this package imports Hydra.
"""
