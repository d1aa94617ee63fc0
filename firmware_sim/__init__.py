"""Stands in for vehicles: physics, faults, drivers and CAN. Shares only `edge_agent.contract` with the agent."""
