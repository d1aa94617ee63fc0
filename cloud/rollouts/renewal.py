"""The server's part in the signed repository: it says again and again that nothing newer exists, with the online keys.

What it cannot do is in `detail`, in plain words, until it can: keys that are missing, a disk that refuses, a root or
list of targets that ends soon and needs the offline keys.
"""

import asyncio
import logging
from pathlib import Path

from cloud.rollouts import keys
from cloud.rollouts.repository import LIFE, ONLINE, ModelRepository
from edge_agent.contract.errors import VoltwatchError

EVERY_S = 600.0  # the shortest life is a day, of which half must be over: hours before vehicles would notice
WARN_DAYS = 30

log = logging.getLogger(__name__)


class Renewal:
    """Renews `repository` with the keys in `folder`; without a folder it only watches. Reads both at every step."""

    def __init__(self, repository: ModelRepository, folder: Path | None) -> None:
        self._repository = repository
        self._folder = folder
        self.detail = ""

    async def step(self) -> None:
        """Renew what is due. Never raises for files and keys: `detail` says what is wrong."""
        before, self.detail = self.detail, await asyncio.to_thread(self._step)
        if self.detail and self.detail != before:
            log.error("models: %s", self.detail)

    def _step(self) -> str:
        try:
            if self._folder is not None:
                done = self._repository.renew(keys.read_all(self._folder, "online"))
                if done:
                    log.info("models: signed %s again", " and ".join(done))
            return self._ends_soon()
        except VoltwatchError as error:
            return str(error)

    def _ends_soon(self) -> str:
        now = self._repository.now()
        for role in self._repository.roles():
            left = role.expires - now
            if role.role not in ONLINE and left.days < WARN_DAYS:
                return f"models: {role.role} ends in {left.days} days; sign it again with the offline keys (rotate)"
            if role.role in ONLINE and left < LIFE[role.role] / 4:
                return (
                    f"models: {role.role} ends in {left.total_seconds() / 3600:.0f} hours, and vehicles then refuse it"
                )
        return ""
