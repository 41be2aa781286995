"""Reports: tables of our results beside the published ones, which name where each number comes from."""
