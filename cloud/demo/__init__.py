"""`fleet-cloud demo`: the whole way on one machine, with the same commands a user would type, one process each."""
