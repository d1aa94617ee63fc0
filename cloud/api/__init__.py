"""The fleet's API: `uvicorn cloud.api:app --port 8000`, configured by the environment (`cloud.api.settings`)."""

from cloud.api.app import create_app

app = create_app()

__all__ = ["app", "create_app"]
