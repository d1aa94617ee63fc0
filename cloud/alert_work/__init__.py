"""An alert as somebody's work: its life cycle, and the label that comes of it."""
