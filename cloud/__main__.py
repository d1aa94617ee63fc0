"""`fleet-cloud`: the commands of the cloud. A command whose extra is not installed says which one it needs."""

import sys
from collections.abc import Callable
from importlib import import_module

from edge_agent.contract.errors import VoltwatchError

# command → (module that has it, the extra that installs what it needs)
COMMANDS = {
    "prepare": ("cloud.training.commands", "training"),
    "train": ("cloud.training.commands", "training"),
    "evaluate": ("cloud.training.commands", "training"),
    "retrain": ("cloud.training.retrain_command", "training"),
    "serve": ("cloud.api.commands", "cloud"),
    "broker": ("cloud.api.commands", "cloud"),
    "provision": ("cloud.identity.commands", "cloud"),
    "models": ("cloud.rollouts.commands", "cloud"),
    "register-reference": ("cloud.drift.commands", "cloud"),
    "demo": ("cloud.demo.command", "training"),
    "advice-model": ("export.sentence_model", "training"),
}


def main() -> None:
    """Run one command; a fault of the user's or the outside's is one line and its exit code, never a traceback."""
    try:
        _app()()
    except VoltwatchError as error:
        print(f"fleet-cloud: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _app() -> Callable[[], None]:
    """Register what is installed; only the wanted command's module is imported where one is named."""
    wanted = next((word for word in sys.argv[1:] if word in COMMANDS), None)
    try:
        import typer  # noqa: PLC0415 - see above
    except ModuleNotFoundError as error:
        sys.exit(f"fleet-cloud: error: needs {error.name}: install voltwatch[{COMMANDS[wanted or 'serve'][1]}]")
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
    app.callback()(_callback)
    for name in [wanted] if wanted else COMMANDS:
        module, extra = COMMANDS[name]
        try:
            command = getattr(import_module(module), name.replace("-", "_"))
            if isinstance(command, typer.Typer):
                app.add_typer(command, name=name)
            else:
                app.command(name)(command)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in {"cloud", "edge_agent", "export"}:
                raise
            if wanted:
                sys.exit(f"fleet-cloud: error: {name} needs {error.name}: install voltwatch[{extra}]")
    return app


def _callback() -> None:
    """Train models, serve the fleet API and collect from vehicles; `fleet-cloud NAME --help` says more."""


if __name__ == "__main__":
    main()
