"""Reports: the results of runs as one page with plots."""
