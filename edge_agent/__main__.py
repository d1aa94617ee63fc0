"""`edge-agent run`, `replay` and `update`: arguments in; one clear line and an exit code when something is wrong."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_agent import logs
from edge_agent.agent import run
from edge_agent.config import BrokerConfig, load_config
from edge_agent.contract.errors import ConfigError, VoltwatchError
from edge_agent.replay import ReplayOptions, replay

PROGRAM = "edge-agent"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (BSD sysexits)."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "run":
            logs.configure(options.log)
            config = load_config(options.config)
            if options.speed is not None:
                config = msgspec.structs.replace(config, speed=options.speed)
            run(config, options.config.resolve())
        elif options.command == "update":
            from edge_agent.update.command import update  # noqa: PLC0415 - TUF is 25 MB that nothing else needs

            if bool(options.target) != bool(options.counter):
                raise ConfigError("give --target and --counter together, or neither: then the cloud is asked")
            return update(load_config(options.config), target=options.target, counter=options.counter,
                          rollout_id=options.rollout)  # fmt: skip
        else:
            logs.configure(options.log, sys.stderr)
            replay(_replay_options(options))
    except VoltwatchError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head`: nobody reads on, and that is their right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Watch one vehicle: score its telemetry, send alerts.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run on a live bus until SIGTERM")
    running.add_argument("--config", type=Path, required=True, help="TOML file; see edge_agent/config.py")
    running.add_argument("--speed", type=_speed, default=None, help="run the clock K times as fast (demonstrations)")
    replaying = commands.add_parser("replay", help="run a recording through the same pipeline")
    replaying.add_argument("file", type=Path, metavar="FILE", help="Parquet or CSV")
    replaying.add_argument("--map", type=Path, required=True, metavar="MAP.toml", help="mapping; docs/your-own-data.md")
    replaying.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    replaying.add_argument("--vehicle", default="", metavar="ID", help="default: the mapping's, else the file's name")
    replaying.add_argument("--schema", type=Path, default=None, help="default: the electric vehicle's")
    replaying.add_argument("--alerts", type=Path, default=None, metavar="OUT.jsonl", help="write one event a line")
    replaying.add_argument("--json", type=Path, default=None, metavar="SUMMARY", help="write the summary as JSON")
    replaying.add_argument("--publish", action="store_true", help="send the alerts to the collector, and wait for it")
    replaying.add_argument("--broker", default="", metavar="HOST:PORT", help="for --publish; default 127.0.0.1:1883")
    replaying.add_argument("--config", type=Path, default=None, help="for --publish: broker and vehicle from this file")
    replaying.add_argument("--data-dir", type=Path, default=None, help="keep what could not be delivered here")
    replaying.add_argument("--timeout", type=float, default=30.0, metavar="S", help="to wait for the collector")
    updating = commands.add_parser("update", help="install a signed release; the agent runs this by itself")
    updating.add_argument("--config", type=Path, required=True, help="the agent's; its [update] says from where")
    updating.add_argument("--target", default="", metavar="NAME", help="signed target; default: the cloud is asked")
    updating.add_argument("--counter", type=int, default=0, metavar="N", help="the counter that is signed with it")
    updating.add_argument("--rollout", default="", metavar="ID", help="of the rollout that asks for it")
    for command in (running, replaying):
        command.add_argument("--log", choices=("text", "json"), default="text")
    return parser


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1000")
    return speed


def _replay_options(options: argparse.Namespace) -> ReplayOptions:
    config = None if options.config is None else load_config(options.config)
    if config is not None and options.broker:
        raise ConfigError("give --config or --broker, not both")
    broker = BrokerConfig() if config is None else config.mqtt
    if options.broker:
        host, _, port = options.broker.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"--broker {options.broker!r} is not HOST:PORT")
        broker = BrokerConfig(host=host.strip("[]"), port=int(port))
    data_dir = options.data_dir
    if data_dir is None and config is not None:
        data_dir = Path(config.data_dir)
    return ReplayOptions(
        recording=options.file,
        mapping=options.map,
        bundle=options.bundle,
        vehicle_id=options.vehicle or ("" if config is None else config.vehicle_id),
        schema=str(options.schema or ("" if config is None else config.schema)),
        alerts=options.alerts,
        summary=options.json,
        broker=broker if options.publish else None,
        data_dir=data_dir,
        timeout_s=options.timeout,
    )


if __name__ == "__main__":
    sys.exit(main())
