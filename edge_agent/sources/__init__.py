"""The only bus and file input: each source turns its kind of telemetry into blocks of arrivals."""
