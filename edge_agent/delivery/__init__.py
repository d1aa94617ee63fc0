"""From a message to the collector's commit: durable outbox, what to send next, and MQTT."""
