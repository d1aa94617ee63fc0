"""`fleet-cloud provision …`: arguments in, what is there now and what to do next out. Keys are never shown."""

import os
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec
import typer

from cloud.identity.names import Role
from cloud.identity.provisioning import (
    BROKER,
    DAYS,
    DEFAULT_COLLECTOR,
    DEFAULT_PORT,
    MAX_DAYS,
    Delivered,
    Provisioning,
    Wanted,
)  # fmt: skip
from cloud.identity.vehicle_folder import vehicle_files
from edge_agent.contract.errors import ConfigError

provision = typer.Typer(
    no_args_is_help=True,
    help="""Identities of vehicles and servers: make certificates, renew and revoke them, tell the broker.

    Begin with `init`, then `vehicle` for each vehicle. Keep the folder where only you can read it, and back it up.
    VOLTWATCH_CA_PASSPHRASE, where it is set, encrypts the authority's key.""",
)

Folder = Annotated[
    Path, typer.Option("--output", "--identity", envvar="VOLTWATCH_IDENTITY", help="The folder of identities.")
]
Request = Annotated[
    Path | None,
    typer.Option("--csr", help="Signing request made on the vehicle, for one: its key stays there, as vehicle.key."),
]
Days = Annotated[int, typer.Option(help="Valid so many days; 0: the role's own.", min=0, max=MAX_DAYS)]
WhichRole = Annotated[Role, typer.Option(help="Whose it is.")]
Hosts = Annotated[
    list[str],
    typer.Option(help="DNS name or IP address the broker is reached by; repeat for more, vehicles use the first."),
]
DEFAULT = Path("var/identity")


@provision.command()
def init(
    *,
    broker_host: Hosts,
    output: Folder = DEFAULT,
    broker_port: Annotated[int, typer.Option(help="Port of the TLS listener.", min=1, max=65_535)] = DEFAULT_PORT,
    install_path: Annotated[
        str, typer.Option(help="Where `broker/` will lie on the broker's machine, as /etc/mosquitto/voltwatch.")
    ] = "",
    days: Days = 0,
) -> None:
    """Make the authority, the broker's folder and the collector's certificate. Run again, it changes nothing."""
    install = PurePosixPath(install_path) if install_path else None
    made = _place(output).init(tuple(broker_host), broker_port, install=install, days=days)
    _say(made)
    collector = output / Role.COLLECTOR / DEFAULT_COLLECTOR
    print(f"broker: mosquitto -c {output / BROKER / 'mosquitto.conf'}")
    print(
        f"collector: fleet-cloud serve --broker {_pair(broker_host[0], broker_port)} --broker-ca {collector}/ca.crt "
        f"--broker-certificate {collector}/identity.pem --broker-key {collector}/identity.pem"
    )


@provision.command()
def vehicle(
    vehicle_id: Annotated[list[str], typer.Argument(help="One or more vehicle ids.", metavar="VEHICLE_ID…")],
    *,
    output: Folder = DEFAULT,
    make: Annotated[str, typer.Option(help="Which bundles fit; goes into agent.toml.")] = "",
    config: Annotated[
        Path | None,
        typer.Option(help="What agent.toml says for all vehicles of the make: source, bundle, …; see the README."),
    ] = None,
    csr: Request = None,
    days: Days = 0,
) -> None:
    """Make vehicles' certificates, each in a folder with its agent.toml that is copied to the vehicle as it is."""
    place = _place(output)
    host, port = place.broker()
    request = _request(csr, vehicle_id)
    wanted = [
        Wanted(
            Role.VEHICLE, name, days or DAYS[Role.VEHICLE],
            vehicle_files(name, make, config, host, port, own_key=csr is not None), request,
        )
        for name in dict.fromkeys(vehicle_id)
    ]  # fmt: skip
    _say(place.add(wanted))


@provision.command()
def collector(
    name: Annotated[str, typer.Argument(help="One for each store; two with one name would take turns.")],
    *,
    output: Folder = DEFAULT,
    days: Days = 0,
) -> None:
    """Make another collector's certificate: it may read every vehicle, and write acks and orders."""
    _add_service(Role.COLLECTOR, name, output, days)


@provision.command()
def subscriber(
    name: Annotated[str, typer.Argument(help="Who or what listens, as: workshop-screen")],
    *,
    output: Folder = DEFAULT,
    days: Days = 0,
) -> None:
    """Make a certificate that may read alerts of every vehicle, and write nothing."""
    _add_service(Role.SUBSCRIBER, name, output, days)


@provision.command()
def renew(
    name: Annotated[list[str] | None, typer.Argument(help="Whose; none with --due.", metavar="[NAME]…")] = None,
    *,
    output: Folder = DEFAULT,
    role: WhichRole = Role.VEHICLE,
    due: Annotated[
        int | None, typer.Option(help="All of the role whose newest certificate ends within so many days.", min=0)
    ] = None,
    broker_host: Annotated[list[str] | None, typer.Option(help="For the broker: other names than before.")] = None,
    csr: Request = None,
    days: Days = 0,
) -> None:
    """Make a new key and certificate in the owner's folder; the one before works on until it ends or is revoked."""
    if bool(name) == (due is not None):
        raise ConfigError("say whose certificate to renew, or --due DAYS")
    if broker_host and role is not Role.BROKER:
        raise ConfigError("--broker-host is for the broker: add --role broker")
    place = _place(output)
    names = list(dict.fromkeys(name or ()))
    if due is not None:
        newest = {listed.entry.name: listed for listed in place.listing(role)}
        names = [n for n, listed in newest.items() if listed.state != "revoked" and listed.days_left < due]
    request = _request(csr, names)
    made = place.renew(role, names, days=days, hosts=tuple(broker_host or ()), request=request)
    _say(made)
    if not made:
        print(f"no {role}'s certificate ends within {timedelta(days=due or 0).days} days")
    elif role is Role.VEHICLE:
        print(
            f"copy identity.pem to each vehicle, restart its agent, then: provision revoke ID --older --output {output}"
        )
    elif role is Role.BROKER:
        print("copy broker/identity.pem to the broker's folder and reload it (SIGHUP)")


@provision.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Whose certificates.")],
    *,
    output: Folder = DEFAULT,
    role: WhichRole = Role.VEHICLE,
    reason: Annotated[str, typer.Option(help="For the register.")] = "",
    older: Annotated[bool, typer.Option("--older", help="All but the newest: after a renewal has arrived.")] = False,
) -> None:
    """Revoke certificates: the broker refuses them, and the name may do nothing, once it has read the two files."""
    due = _place(output).revoke(role, name, reason, older=older)
    for entry in due:
        print(f"{name}: revoked {entry.serial}, issued {entry.issued}")
    if due:
        print(f"copy {output / BROKER}/crl.pem and acl to the broker's folder and reload it (SIGHUP)")
    else:
        print(f"{name}: nothing to revoke; nothing changed")


@provision.command(name="list")
def show(
    *,
    output: Folder = DEFAULT,
    role: Annotated[Role | None, typer.Option(help="Only this role's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List every certificate: whose, its state, until when, and whether it still lies in its folder."""
    listed = _place(output).listing(role)
    if as_json:
        rows = [
            {**msgspec.to_builtins(one.entry), "state": one.state, "days_left": one.days_left, "here": one.here}
            for one in listed
        ]
        print(msgspec.json.encode(rows).decode())
        return
    for one in listed:
        left = f" ({one.days_left} days)" if one.state == "valid" else ""
        here = "" if one.here or one.state == "revoked" else "  not in its folder"
        print(
            f"{one.entry.role:<10} {one.entry.name:<24} {one.state:<8} until {one.entry.until}{left}"
            f"  {one.entry.serial}{here}"
        )


def _place(output: Path) -> Provisioning:
    return Provisioning(output, passphrase=os.environ.get("VOLTWATCH_CA_PASSPHRASE", "").encode())


def _request(csr: Path | None, names: list[str]) -> bytes:
    if csr is None:
        return b""
    if len(names) != 1:
        raise ConfigError("--csr is one vehicle's: name one")
    try:
        return csr.read_bytes() or b"empty"
    except OSError as error:
        raise ConfigError(f"request {csr}: {(error.strerror or str(error)).lower()}") from error


def _add_service(role: Role, name: str, output: Path, days: int) -> None:
    made = _place(output).add([Wanted(role, name, days or DAYS[role])])
    _say(made)
    if made[0].made:
        print(f"copy {output / BROKER}/acl to the broker's folder and reload it (SIGHUP)")


def _say(delivered: list[Delivered]) -> None:
    for one in delivered:
        what = "made" if one.made else "is there already; nothing changed"
        print(f"{one.entry.role} {one.entry.name}: {one.folder} {what}, valid until {one.entry.until}")


def _pair(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
