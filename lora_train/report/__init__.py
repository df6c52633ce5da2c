"""What a run was, as a page, as plots and in the terminal; from what its directory holds."""
