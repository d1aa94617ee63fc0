"""What to repair, from the manual, with its source."""
