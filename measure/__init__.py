"""What a run is worth: measured on held-out CVs, and by what its JDs do for others."""
