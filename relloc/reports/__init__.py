"""Reports: tables of our results beside the published ones, with the source of each number."""
