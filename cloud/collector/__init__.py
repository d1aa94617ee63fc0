"""MQTT in: decide about each message (`ingest`, pure), commit, acknowledge (`mqtt`, the only paho in the cloud)."""
