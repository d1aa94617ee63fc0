"""Motor and inverter: from speed, slope and mass to torque, losses, temperatures and the vibration of the bearing.

`demand` is algebra over whole traces; `Powertrain.run` steps the four temperatures (power module, its sensor, motor,
coolant) and lets the controller reduce torque when the sensor reads hot, as real ones do. The module's temperature
follows the square of the current through a thermal resistance to the coolant: a worn or unwetted module shows as a
residual against load, not as a level. Vibration is what a sensor computes at 10 kHz from one second of acceleration.
"""

from dataclasses import dataclass

import numpy as np

from edge_agent.contract.signals import FloatArray

GRAVITY = 9.81
AIR_KG_PER_M3 = 1.2
ROLLING = 0.0105
DRIVELINE_EFFICIENCY = 0.97

MODULE_TAU_S = 22.0  # power module and base plate, new
SENSOR_TAU_S = 7.0  # the sensor sits beside the chip, and lags it
MOTOR_K_PER_W = 0.045
MOTOR_HEAT_J_PER_K = 14_000.0
COOLANT_HEAT_J_PER_K = 21_000.0  # 5 l of water-glycol and the housings
FAN_ON_C, FAN_W_PER_K = 48.0, 65.0
DERATE_FROM_C, DERATE_TO_C, DERATE_LEAST = 100.0, 120.0, 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class PowertrainConstants:
    """What does not change for a vehicle; each array is [V]."""

    mass_kg: FloatArray
    drag_area_m2: FloatArray
    gear_m_per_rad: FloatArray
    torque_max_nm: FloatArray
    power_max_w: FloatArray
    phase_a_per_nm: FloatArray
    inverter_k_per_w: FloatArray
    radiator_w_per_k: FloatArray
    vibration_g: FloatArray  # RMS at 1750 rpm, new: 0.073 g on the reference bearing


@dataclass(frozen=True, slots=True)
class Demand:
    """What the road asks of the powertrain, [T, V]: rotor rad/s, torque Nm, shaft watts, losses in watts."""

    rotor_rad_per_s: FloatArray
    torque_nm: FloatArray
    shaft_w: FloatArray
    inverter_loss_w: FloatArray
    motor_loss_w: FloatArray


@dataclass(frozen=True, slots=True)
class PowertrainTrace:
    """What the powertrain did, [T, V]: °C each, and the share of the torque that the controller allowed."""

    module_sensor_c: FloatArray
    motor_c: FloatArray
    coolant_c: FloatArray
    allowed: FloatArray


def demand(
    c: PowertrainConstants,
    *,
    speed_kmh: FloatArray,
    acceleration_m_per_s2: FloatArray,
    slope: FloatArray,
    mass_factor: FloatArray,
    friction_w: FloatArray,
) -> Demand:
    """Turn forces on the vehicle into torque and losses; all traces [T, V], mass_factor [V] or [T, V]."""
    v = speed_kmh / 3.6
    mass = c.mass_kg * mass_factor
    moving = v > 0.15
    force = mass * (acceleration_m_per_s2 + GRAVITY * (slope + ROLLING)) + 0.5 * AIR_KG_PER_M3 * c.drag_area_m2 * v * v
    rotor = v / c.gear_m_per_rad
    most = np.minimum(c.torque_max_nm, c.power_max_w / np.maximum(rotor, 1.0))
    torque = np.where(moving, force * c.gear_m_per_rad, 0.0)
    torque = np.where(torque > 0, torque / DRIVELINE_EFFICIENCY, torque * DRIVELINE_EFFICIENCY)
    # Regeneration fades below 8 km/h and the brakes take what exceeds 70 % of the torque.
    torque = np.clip(torque, -0.7 * most * np.clip(speed_kmh / 8.0 - 0.25, 0.0, 1.0), most)
    phase_a = np.abs(torque) * c.phase_a_per_nm
    inverter = moving * 90.0 + 0.9 * phase_a + 0.0085 * phase_a * phase_a
    motor = 0.030 * torque * torque + 2.2e-4 * rotor * rotor + friction_w * moving
    return Demand(rotor, torque, torque * rotor, inverter, motor)


class Powertrain:
    """V powertrains with the state of their temperatures, [V] each, °C."""

    def __init__(self, constants: PowertrainConstants, ambient_c: FloatArray) -> None:
        self.constants = constants
        self.module_c = ambient_c.copy()
        self.sensor_c = ambient_c.copy()
        self.motor_c = ambient_c.copy()
        self.coolant_c = ambient_c.copy()

    def rest(self, hours: FloatArray, ambient_c: FloatArray) -> None:
        """Sleep for `hours` [V]: everything relaxes towards the air (time constant 1.5 h)."""
        share = 1.0 - np.exp(-hours / 1.5)
        states = (self.module_c, self.sensor_c, self.motor_c, self.coolant_c)
        self.module_c, self.sensor_c, self.motor_c, self.coolant_c = (s + (ambient_c - s) * share for s in states)

    def run(
        self,
        asked: Demand,
        *,
        speed_kmh: FloatArray,
        ambient_c: FloatArray,
        resistance_factor: FloatArray,
        flow_factor: FloatArray,
        charger_loss_w: FloatArray,
    ) -> PowertrainTrace:
        """Step the temperatures through T seconds. All [T, V]; flow_factor 1 = the pump's full flow."""
        c = self.constants
        sensor, motor, coolant, allowed = (np.empty_like(speed_kmh) for _ in range(4))
        module_heat = MODULE_TAU_S / c.inverter_k_per_w  # J/K
        # A thin film of coolant carries less: the convective half of the resistance goes with flow^-0.8.
        r_module = c.inverter_k_per_w * (resistance_factor - 0.5 + 0.5 * np.maximum(flow_factor, 0.02) ** -0.8)
        g_module = 1.0 / r_module
        g_motor = 1.0 / (MOTOR_K_PER_W * (0.6 + 0.4 * np.maximum(flow_factor, 0.02) ** -0.8))
        g_air = (c.radiator_w_per_k + 2.6 * speed_kmh**0.8) * (0.25 + 0.75 * flow_factor)
        k_module, k_motor, k_coolant = 1.0 / module_heat, 1.0 / MOTOR_HEAT_J_PER_K, 1.0 / COOLANT_HEAT_J_PER_K
        k_sensor = 1.0 - np.exp(-1.0 / SENSOR_TAU_S)
        per_k = (1.0 - DERATE_LEAST) / (DERATE_TO_C - DERATE_FROM_C)
        fan: FloatArray = np.zeros_like(self.coolant_c)
        for t in range(speed_kmh.shape[0]):
            if t % 10 == 0:
                fan = np.where(self.coolant_c > FAN_ON_C, FAN_W_PER_K, 0.0)
            share = np.minimum(np.maximum(1.0 - (self.sensor_c - DERATE_FROM_C) * per_k, DERATE_LEAST), 1.0)
            squared = share * share
            from_module = (self.module_c - self.coolant_c) * g_module[t]
            from_motor = (self.motor_c - self.coolant_c) * g_motor[t]
            to_air = (self.coolant_c - ambient_c[t]) * (g_air[t] + fan)
            self.module_c = self.module_c + (asked.inverter_loss_w[t] * squared - from_module) * k_module
            self.motor_c = self.motor_c + (asked.motor_loss_w[t] * squared - from_motor) * k_motor
            self.coolant_c = self.coolant_c + (from_module + from_motor + charger_loss_w[t] - to_air) * k_coolant
            self.sensor_c = self.sensor_c + (self.module_c - self.sensor_c) * k_sensor
            sensor[t], motor[t], coolant[t], allowed[t] = self.sensor_c, self.motor_c, self.coolant_c, share
        return PowertrainTrace(sensor, motor, coolant, allowed)


def vibration(
    rng: np.random.Generator,
    rotor_rpm: FloatArray,
    torque_share: FloatArray,
    *,
    healthy_g: float,
    rms_factor: FloatArray,
    fault_kurtosis: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """RMS in g and kurtosis of each second's acceleration at the bearing, [T] each, of one vehicle.

    The new bearing gives 0.073 g, 2.8 at 1750 rpm (CWRU). Impacts of a damaged race need rotation: below 200 rpm only
    the road is felt, and a pothole is a peak in both values.
    """
    n = rotor_rpm.size
    turning = np.clip(rotor_rpm / 200.0, 0.0, 1.0)
    bearing = healthy_g * (rotor_rpm / 1750.0) ** 0.55 * (1.0 + 0.25 * np.abs(torque_share)) * turning
    road = 0.012 * (rotor_rpm / 4000.0) * rng.lognormal(0.0, 0.35, n)
    worn = bearing * rms_factor * rng.lognormal(0.0, 0.07, n)
    potholes = (rng.random(n) < 0.004) * (rotor_rpm > 300) * rng.uniform(0.1, 0.5, n)
    rms = np.sqrt(worn**2 + road**2 + potholes**2 + 0.006**2)
    # The impacts' share of the energy decides how much of their kurtosis is seen.
    share = np.where(rms > 0, (worn / rms) ** 2, 0.0) * turning
    kurtosis = 2.95 + (fault_kurtosis - 2.95) * share * rng.lognormal(0.0, 0.12, n)
    kurtosis = kurtosis + rng.normal(0.0, 0.14, n) + potholes * rng.uniform(8.0, 30.0, n)
    return rms, np.maximum(kurtosis, 1.5)
