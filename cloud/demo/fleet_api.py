"""What the demo asks the fleet API, as any client would."""

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from edge_agent.contract.errors import UnavailableError

_TIMEOUT_S = 5.0


class FleetApi:
    """A reader of one server. Its methods raise `UnavailableError` when the server does not answer."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def is_up(self) -> bool:
        """Tell whether the server answers its health check."""
        try:
            self._get("/")
        except UnavailableError:
            return False
        return True

    def collects(self) -> bool:
        """Tell whether the server's collector is connected to the broker."""
        return bool(self._get("/health")["broker"]["connected"])

    def vehicles(self) -> list[dict[str, Any]]:
        """Return every vehicle's newest state."""
        found: list[dict[str, Any]] = self._get("/vehicles?limit=100")["vehicles"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Return the alerts, newest arrival first."""
        found: list[dict[str, Any]] = self._get("/alerts?limit=100")["alerts"]
        return found

    def advice(self, alert: dict[str, Any]) -> dict[str, Any]:
        """Return the repair advice on one of `alerts`."""
        return self._get(advice_path(alert))

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(self.address + path, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - http, above
                body: dict[str, Any] = json.load(answer)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise UnavailableError(f"{self.address}{path}: {error}") from error
        return body


def advice_path(alert: dict[str, Any]) -> str:
    """Return where the whole advice on an alert is, below the server's address."""
    return f"/v1/alerts/{urllib.parse.quote(alert['alert_id'], safe='')}/advice?vehicle_id={alert['vehicle_id']}"
