"""The lake: raw windows for training, in Parquet, partitioned by day."""
