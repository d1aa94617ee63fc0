"""What the fleet's counts say against the bundle's reference, and whether it is time to train again."""
