"""One vehicle of the fleet, with its alerts."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from pydantic import Field

from cloud.api import models, shown
from cloud.api.endpoint import AWAY, NOT_FOUND, WRONG, Running, only_known_parameters
from cloud.api.problems import ProblemError
from cloud.store import reading
from cloud.store.reading import AlertFilter
from edge_agent.contract.topics import VEHICLE_ID

NEWEST = 100  # alerts shown with a vehicle; GET /v1/alerts?vehicle_id= pages through all

router = APIRouter(
    prefix="/v1/vehicles", tags=["fleet"], dependencies=[Depends(only_known_parameters)], responses=WRONG
)


class VehicleDetail(models.Vehicle):
    """One vehicle as it was last heard of, and its newest alerts."""

    alerts: list[models.Alert] = Field(description=f"The newest {NEWEST}, newest arrival first.")


@router.get("/{vehicle_id}", summary="One vehicle", responses={**AWAY, **NOT_FOUND})
async def vehicle(
    running: Running, vehicle_id: Annotated[str, Path(pattern=f"^{VEHICLE_ID.pattern}$", examples=["EV_001"])]
) -> VehicleDetail:
    """One vehicle: whether it is online, what scores it, its newest scores, its alerts with their work."""
    async with running.store.reading() as connection:
        row = await reading.vehicle(connection, vehicle_id)
        if row is None:
            raise ProblemError(404, f"there is no vehicle {vehicle_id} here; GET /vehicles lists what there is")
        open_alerts = await reading.open_alerts(connection, [vehicle_id])
        newest = await reading.alerts(connection, AlertFilter(vehicle_id=vehicle_id), before=None, limit=NEWEST)
    seen = shown.vehicle(row, [shown.open_alert(alert) for alert in open_alerts], running.wall())
    return VehicleDetail(**dict(seen), alerts=[shown.alert(alert) for alert in newest])
