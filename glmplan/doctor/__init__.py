"""What would go wrong on these hosts, with the repair: one check per function."""
