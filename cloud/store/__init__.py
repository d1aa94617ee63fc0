"""The fleet's store: tables, migrations, and the few statements that write and read them.

SQLite (WAL) by default, PostgreSQL by URL; nothing here knows MQTT or HTTP.
"""
