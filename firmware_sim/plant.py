"""The whole machine of V vehicles: powertrain, battery and inlet stepped together under their duties.

Holds the physical state between calls; says nothing about what a sensor would make of it (`sensors.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.contract.signals import FloatArray
from firmware_sim import charger, powertrain, runaway
from firmware_sim.battery import Battery, PackConstants
from firmware_sim.driver import AC, DC, IntArray
from firmware_sim.duty import Duty
from firmware_sim.powertrain import Powertrain, PowertrainConstants
from firmware_sim.vehicle import Vehicle


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What really happened to one vehicle, [T] each; pack current and power positive OUT."""

    mode: IntArray
    charging: IntArray
    speed_kmh: FloatArray
    odometer_km: FloatArray
    ambient_c: FloatArray
    pack_v: FloatArray
    pack_a: FloatArray
    soc: FloatArray
    pack_c: FloatArray
    inner_drop_v: FloatArray
    request_w: FloatArray
    inlet_c: FloatArray
    rotor_rpm: FloatArray
    torque_nm: FloatArray
    motor_c: FloatArray
    coolant_c: FloatArray
    module_sensor_c: FloatArray
    parameters: dict[str, FloatArray]
    since_runaway_s: FloatArray


def _column(vehicles: Sequence[Vehicle], of: str) -> FloatArray:
    return np.array([float(getattr(v.make, of)) for v in vehicles])


class Plant:
    """V vehicles with their physical state; begin after a night at `ambient_c` [V] with charge `soc` [V]."""

    def __init__(self, vehicles: Sequence[Vehicle], soc: FloatArray, ambient_c: FloatArray) -> None:
        self.vehicles = tuple(vehicles)
        self._pack = Battery(
            PackConstants(
                cells=_column(vehicles, "cells"),
                capacity_ah=_column(vehicles, "capacity_ah") * np.array([v.soh for v in vehicles]),
                resistance_ohm=_column(vehicles, "resistance_ohm") * np.array([v.resistance_factor for v in vehicles]),
                heat_capacity_j_per_k=_column(vehicles, "pack_heat_capacity_j_per_k"),
                liquid_cooled=_column(vehicles, "liquid_cooled_pack"),
                charge_power_w=_column(vehicles, "dc_power_w"),
            ),
            soc,
            ambient_c,
        )
        self._powertrain = Powertrain(
            PowertrainConstants(
                mass_kg=_column(vehicles, "mass_kg"),
                drag_area_m2=_column(vehicles, "drag_area_m2"),
                gear_m_per_rad=_column(vehicles, "gear_m_per_rad"),
                torque_max_nm=_column(vehicles, "torque_max_nm"),
                power_max_w=_column(vehicles, "power_max_w"),
                phase_a_per_nm=_column(vehicles, "phase_a_per_nm"),
                inverter_k_per_w=_column(vehicles, "inverter_k_per_w")
                * np.array([v.inverter_factor for v in vehicles]),
                radiator_w_per_k=_column(vehicles, "radiator_w_per_k"),
                vibration_g=np.array([v.vibration_g for v in vehicles]),
            ),
            ambient_c,
        )
        self._inlet = charger.Inlet(len(vehicles))
        self._ac_w = _column(vehicles, "ac_power_w")
        self._dc_w = _column(vehicles, "dc_power_w")
        self._odometer_km = np.array([v.odometer_km for v in vehicles])

    @property
    def soc(self) -> FloatArray:
        """State of charge now, [V], 0 to 1."""
        return self._pack.soc.copy()

    def rest(self, hours: FloatArray, ambient_c: FloatArray, soc: FloatArray) -> None:
        """Sleep for `hours` [V] and wake with charge `soc` [V] (charging at home is not recorded)."""
        self._pack.rest(hours, ambient_c, soc)
        self._powertrain.rest(hours, ambient_c)
        self._inlet.rest()

    def run(self, duties: Sequence[Duty]) -> list[Truth]:
        """Step all vehicles through duties of one length; one `Truth` a vehicle, in order."""

        def stack(of: str) -> FloatArray:
            return np.stack([getattr(d, of) for d in duties], axis=1)

        def parameter(name: str) -> FloatArray:
            return np.stack([d.parameters[name] for d in duties], axis=1)

        mode = np.stack([d.mode for d in duties], axis=1)
        speed, air, auxiliary = stack("speed_kmh"), stack("ambient_c"), stack("auxiliary_w")
        allowed, since = stack("allowed"), stack("since_runaway_s")
        plugged = (mode == AC) | (mode == DC)
        asked = powertrain.demand(
            self._powertrain.constants,
            speed_kmh=speed,
            acceleration_m_per_s2=stack("acceleration_m_per_s2"),
            slope=stack("slope"),
            mass_factor=stack("mass_factor"),
            friction_w=parameter("bearing_friction_w"),
        )
        charge_w = stack("offered_w") * allowed * parameter("charge_power_factor")
        drive = self._powertrain.run(
            asked,
            speed_kmh=speed,
            ambient_c=air,
            resistance_factor=parameter("inverter_resistance_factor"),
            flow_factor=parameter("coolant_flow_factor"),
            charger_loss_w=np.where(mode == AC, charge_w * charger.ONBOARD_LOSS, 0.0),
        )
        squared = drive.allowed * drive.allowed
        losses = (asked.inverter_loss_w + asked.motor_loss_w) * squared
        motor_w = np.where(asked.shaft_w > 0, asked.shaft_w * drive.allowed, asked.shaft_w) + losses
        power = np.where(plugged, auxiliary - charge_w, motor_w + auxiliary)
        power = np.where(since > 15.0, 0.0, power)
        pack = self._pack.run(
            power,
            ambient_c=air,
            resistance_factor=parameter("pack_resistance_factor"),
            capacity_factor=parameter("pack_capacity_factor"),
            extra_heat_w=parameter("cell_short_w"),
        )
        into = np.maximum(-pack.voltage_v * pack.current_a, 0.0) * plugged
        inlet = air + self._inlet.run(
            charger.contact_heat_k(mode, into, pack.voltage_v, parameter("contact_resistance_factor"))
        )
        request = np.where(mode == AC, np.minimum(pack.request_w, self._ac_w), 0.0)
        request = np.where(mode == DC, np.minimum(pack.request_w, self._dc_w), request)
        charging = ((into > 200.0) & (allowed > 0)).astype(np.int8)
        odometer = self._odometer_km + np.cumsum(speed, axis=0) / 3600.0
        self._odometer_km = odometer[-1]
        torque = asked.torque_nm * np.where(asked.torque_nm > 0, drive.allowed, 1.0)
        rpm = asked.rotor_rad_per_s * (30.0 / np.pi)
        cells = self._pack.constants.cells
        lost = np.stack(
            [runaway.dead_cells(d.since_runaway_s, v.make.cells) for d, v in zip(duties, self.vehicles, strict=True)],
            axis=1,
        )
        pack_v = pack.voltage_v * (1.0 - lost / cells)
        return [
            Truth(
                mode=duty.mode,
                charging=charging[:, i],
                speed_kmh=duty.speed_kmh,
                odometer_km=odometer[:, i],
                ambient_c=duty.ambient_c,
                pack_v=pack_v[:, i],
                pack_a=pack.current_a[:, i],
                soc=pack.soc[:, i],
                pack_c=pack.temperature_c[:, i],
                inner_drop_v=pack.inner_drop_v[:, i],
                request_w=request[:, i],
                inlet_c=inlet[:, i],
                rotor_rpm=rpm[:, i],
                torque_nm=torque[:, i],
                motor_c=drive.motor_c[:, i],
                coolant_c=drive.coolant_c[:, i],
                module_sensor_c=drive.module_sensor_c[:, i],
                parameters=duty.parameters,
                since_runaway_s=duty.since_runaway_s,
            )
            for i, duty in enumerate(duties)
        ]
