"""Reports: our results beside the published ones, as tables that name where each number comes from."""
