"""Releases for the fleet: the signed repository they are published in."""
