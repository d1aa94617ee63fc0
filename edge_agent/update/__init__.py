"""Releases over the air. The agent imports only `slots` and `outcome` of it; TUF lives in the updater's own process."""
