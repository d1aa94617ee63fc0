"""A whole fleet on real processes: a broker, a cloud, and vehicles of two processes each."""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from cloud.demo.command import agent_config, broker_command
from cloud.demo.fleet_api import FleetApi
from cloud.demo.processes import Processes, answers, free_port

PYTHON = (sys.executable, "-m")
SPEED = 60


class Fleet:
    """A broker and a cloud, and vehicles on request."""

    def __init__(self, processes: Processes, folder: Path, bundle: Path | None, broker_kind: str = "mosquitto") -> None:
        self.processes, self.folder, self.bundle = processes, folder, bundle
        self.lake = folder / "lake"
        self.broker_port, port = free_port(), free_port()
        self.database = folder / "fleet.db"
        embedded = (*PYTHON, "cloud", "broker", "--port", str(self.broker_port))
        processes.start("broker", embedded if broker_kind == "embedded" else broker_command(folder, self.broker_port))
        processes.wait_for("no broker", lambda: answers(self.broker_port), 20)
        with_bundle = ("--bundle", str(bundle)) if bundle else ()
        processes.start(
            "cloud",
            (*PYTHON, "cloud", "serve", "--port", str(port), "--broker", f"127.0.0.1:{self.broker_port}",
             "--database", f"sqlite:///{self.database}", "--lake", str(self.lake), *with_bundle),
        )  # fmt: skip
        self.api = FleetApi(port)
        processes.wait_for("no cloud", self.api.is_up, 30)
        processes.wait_for("no collector", self.api.collects, 30)

    def vehicle(self, name: str, *drive: str) -> None:
        """Start one simulator and its agent."""
        folder = self.folder / name
        folder.mkdir()
        self.processes.start(
            f"{name}-simulator",
            (*PYTHON, "firmware_sim", "drive", "--vehicle", name, "--can", f"slcan-pty:{folder / 'can'}",
             "--speed", str(SPEED), *drive),
        )  # fmt: skip
        self.processes.wait_for("no CAN port", (folder / "can").exists, 20)
        config = folder / "agent.toml"
        config.write_text(agent_config(name, folder, self.bundle or folder / "absent", self.broker_port))
        self.processes.start(
            f"{name}-agent", (*PYTHON, "edge_agent", "run", "--config", str(config), "--speed", str(SPEED))
        )

    def alert(self, name: str, origin: str = "model") -> dict[str, Any] | None:
        """Return the newest alert of a vehicle with that origin."""
        found = [a for a in self.api.alerts() if a["vehicle_id"] == name and a["origin"] == origin]
        return found[0] if found else None

    def get(self, path: str) -> dict[str, Any]:
        """GET a path of the API."""
        with urllib.request.urlopen(self.api.address + path, timeout=5) as answer:
            body: dict[str, Any] = json.load(answer)
        return body

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """POST JSON to a path of the API; returns the status and the body, a problem's too."""
        request = urllib.request.Request(
            self.api.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refusal:
            return refusal.code, json.load(refusal)
