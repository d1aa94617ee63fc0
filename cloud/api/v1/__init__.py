"""The fleet API under /v1/: one file an area, each with its endpoints and what they answer with."""
