"""The makes of vehicle there are: pack, drivetrain and cooling, as numbers.

The makes are invented; the two reference packs behind them are measured ones (an i3-class and a Leaf-class pack: pack
resistance 72 and 66 mΩ at 20 to 35 °C, warming of 0.6 °C in ten minutes at the 99th percentile). Nothing here varies
from one vehicle of a make to the next; that is `vehicle.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """What all vehicles of one make have in common; resistance is the whole pack's at 25 °C and 1 s."""

    name: str
    cells: int
    probes: int
    capacity_ah: float
    resistance_ohm: float
    pack_heat_capacity_j_per_k: float
    liquid_cooled_pack: bool
    mass_kg: float
    drag_area_m2: float
    gear_m_per_rad: float  # vehicle metres per radian of the rotor
    torque_max_nm: float
    power_max_w: float
    phase_a_per_nm: float
    inverter_k_per_w: float  # power module to coolant, new
    radiator_w_per_k: float  # at standstill, without the fan
    ac_power_w: float
    dc_power_w: float


MAKES = (
    Make(
        name="aurora", cells=96, probes=24, capacity_ah=94.0, resistance_ohm=0.066, pack_heat_capacity_j_per_k=4.6e5,
        liquid_cooled_pack=True, mass_kg=1450, drag_area_m2=0.69, gear_m_per_rad=0.0361, torque_max_nm=250,
        power_max_w=125e3, phase_a_per_nm=1.6, inverter_k_per_w=0.060, radiator_w_per_k=26, ac_power_w=7.2e3,
        dc_power_w=50e3,
    ),
    Make(
        name="borealis", cells=108, probes=24, capacity_ah=156.0, resistance_ohm=0.054,
        pack_heat_capacity_j_per_k=6.6e5, liquid_cooled_pack=True, mass_kg=2050, drag_area_m2=0.66,
        gear_m_per_rad=0.0330, torque_max_nm=330,
        power_max_w=170e3, phase_a_per_nm=1.45, inverter_k_per_w=0.045, radiator_w_per_k=34, ac_power_w=11e3,
        dc_power_w=125e3,
    ),
    Make(
        name="cirrus", cells=96, probes=12, capacity_ah=114.0, resistance_ohm=0.066, pack_heat_capacity_j_per_k=4.3e5,
        liquid_cooled_pack=False, mass_kg=1600, drag_area_m2=0.70, gear_m_per_rad=0.0385, torque_max_nm=300,
        power_max_w=110e3, phase_a_per_nm=1.35, inverter_k_per_w=0.055, radiator_w_per_k=28, ac_power_w=5.5e3,
        dc_power_w=46e3,
    ),
    Make(
        name="dorado", cells=87, probes=23, capacity_ah=120.0, resistance_ohm=0.074, pack_heat_capacity_j_per_k=5.0e5,
        liquid_cooled_pack=True, mass_kg=1750, drag_area_m2=0.74, gear_m_per_rad=0.0350, torque_max_nm=270,
        power_max_w=120e3, phase_a_per_nm=1.5, inverter_k_per_w=0.066, radiator_w_per_k=24, ac_power_w=6.6e3,
        dc_power_w=70e3,
    ),
)  # fmt: skip
BY_NAME = {make.name: make for make in MAKES}
