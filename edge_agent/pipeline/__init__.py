"""From arrivals to a decision: the same code on the vehicle, in a replay, in training and in the server.

Knows only the contract: no network, no bus, no clock of its own. Time comes in with the arrivals.
"""
