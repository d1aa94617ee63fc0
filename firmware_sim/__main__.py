"""Entry point of `firmware-sim`: a fault, or an extra that is not installed, is one line and its exit code."""

import sys

from edge_agent.contract.errors import VoltwatchError


def main() -> None:
    """Run one command; a fault of the user's or the outside's is never a traceback."""
    try:
        from firmware_sim.commands import app  # noqa: PLC0415 - typer may not be installed

        app()
    except VoltwatchError as error:
        print(f"firmware-sim: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in {"edge_agent", "firmware_sim"}:
            raise
        sys.exit(f"firmware-sim: error: needs {error.name}: install voltwatch[sim]")


if __name__ == "__main__":
    main()
