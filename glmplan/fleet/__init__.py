"""Many hosts at once: launch, follow, judge, stop."""
