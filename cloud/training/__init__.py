"""Raw telemetry with or without failure labels → dataset → heads → thresholds → an honest evaluation."""
