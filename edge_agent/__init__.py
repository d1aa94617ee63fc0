"""The agent on the vehicle gateway: telemetry in, alerts out, models updated over the air.

Base dependencies only (numpy, onnxruntime, msgspec, paho-mqtt); see docs/adr/0002.
"""
