"""The command line of the simulations: ``python run_sim.py [SCENARIO] [key=value ...]``."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import glob
import json
import os
import shlex
import shutil
import sys
import tomllib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ot_federated.cache import atomic_write_text
from ot_federated.config import flatten, parse_run_config
from ot_federated.errors import ConfigError, OtFederatedError, nearest_match
from ot_federated.package_assets import is_package_source
from ot_federated.reporting.run_directory import BusyRunError, config_file
from ot_federated.settings import Key, Scalar, check_value
from ot_federated.sources import is_local_source
from simulations.command_line_help import describe_scenarios, describe_usage
from simulations.ending_signals import ending_signals_interrupt
from simulations.scenario_files import list_all_keys, load_scenario, simulation_keys

simulation_file = "simulation.json"
# What it holds besides settings: how the run began.
_origin = ("scenario", "command")
# These settings may name a file, a glob or a directory; the app runs elsewhere, so such a name is made absolute.
_source_keys = ("model.source", "data.train", "data.validation", "data.test", "offsite.public-text")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for, checked.

    Attributes:
        scenario: Name of the scenario.
        description: Its description.
        engine: ``ray`` or ``in-process``.
        run_config: Every run-config key with its value.
        num_clients: Simulated clients.
        client_num_cpus: CPUs of one client.
        client_num_gpus: Share of a GPU of one client.
        output_dir: Absolute directory of the run.
        command: The command line, for the run's summary; where a run is continued, the one that began it.
    """

    scenario: str
    description: str
    engine: str
    run_config: Mapping[str, Scalar]
    num_clients: int
    client_num_cpus: int
    client_num_gpus: float
    output_dir: Path
    command: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ". Settings are written without dashes: key=value" if "unrecognized arguments: --" in message else ""
        raise ConfigError(f"{message}{hint}. See --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a simulation and return the exit status: 0 done, 1 the run failed, 2 the request is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with ending_signals_interrupt():
            return _run(words)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OtFederatedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in: run_sim.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: Sequence[str]) -> int:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--engine", choices=("ray", "in-process"), default="ray")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    options = parser.parse_intermixed_args(words)
    if options.help:
        print(describe_usage())
        return 0
    if options.list:
        print(describe_scenarios())
        return 0
    request = build_request(
        options.words,
        engine=options.engine,
        output=options.output,
        command=shlex.join(["python", "run_sim.py", *words]),
    )
    print(f"Scenario {request.scenario}: {request.description}. Output: {request.output_dir}", flush=True)
    try:
        _write_simulation(request)
        if request.engine == "ray":
            _run_on_ray(request)
        else:
            _run_in_process(request)
    except BaseException:
        if any((request.output_dir / "checkpoints").glob("round-*")):
            again = shlex.join(["python", "run_sim.py", "--output", str(request.output_dir), "resume=true"])
            print(f"To go on from the last finished round: {again}", file=sys.stderr)
        raise
    return 0


def _write_simulation(request: Request) -> None:
    """Note what the run config does not hold, so that ``resume=true`` finds it."""
    path = request.output_dir / simulation_file
    if not path.exists() or not request.run_config["resume"]:
        settings = {
            "num-clients": request.num_clients,
            "client-num-cpus": request.client_num_cpus,
            "client-num-gpus": request.client_num_gpus,
            "scenario": request.scenario,
            "command": request.command,
        }
        atomic_write_text(path, json.dumps(settings, indent=2) + "\n")


def build_request(words: Sequence[str], *, engine: str, output: Path | None, command: str) -> Request:
    """Return the checked request: the scenario's settings, and on top of them those of the command line.

    Args:
        words: At most one scenario name, and settings ``key=value``.
        engine: ``ray`` or ``in-process``.
        output: Directory of the run; None for ``runs/<scenario>-<UTC time>``.
        command: The command line as the user typed it.

    Raises:
        ConfigError: If anything is unknown, given twice, of the wrong type, out of range or contradictory.
    """
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise ConfigError(f"{names[1]!r} is neither key=value nor the one scenario ({names[0]!r}). See --help.")
    scenario = load_scenario(names[0] if names else "default")
    defaults = {name: key.default for name, key in simulation_keys.items()}
    given = parse_settings([word for word in words if "=" in word])
    # What is continued keeps its settings; they need not be typed again.
    started = _read_started_run(output) if given.get("resume") and output is not None and not names else {}
    settings = {**defaults, **scenario.settings, **started, **given}
    simulation = {name: settings.pop(name) for name in simulation_keys}
    run_config = flatten(parse_run_config(make_sources_absolute(settings, base=Path.cwd())))
    if run_config["resume"] and output is None and not run_config["output-dir"]:
        raise ConfigError("resume=true needs --output DIR: the directory of the run to go on with.")
    if output is not None and run_config["output-dir"]:
        raise ConfigError("output-dir and --output are the same setting: give one of them.")
    num_clients, min_nodes = int(simulation["num-clients"]), int(run_config["strategy.min-nodes"])
    if num_clients < min_nodes:
        raise ConfigError(
            f"num-clients={num_clients} is fewer than strategy.min-nodes={min_nodes}: no round could start. "
            f"Give strategy.min-nodes={num_clients}."
        )
    named = output or (Path(str(run_config["output-dir"])) if run_config["output-dir"] else None)
    output_dir = (named or _choose_output_dir(scenario.name)).expanduser().absolute()
    known = {**scenario.settings, **started, **given}
    theirs = [name for name in ("data.validation", "data.test") if name not in known]
    if theirs and run_config["data.train"] != list_all_keys()["data.train"].default:
        raise ConfigError(
            f"data.train={run_config['data.train']!r} goes with {' and '.join(theirs)} of its own: without, the model "
            "would be judged on the default scenario's questions."
        )
    if not run_config["resume"] and (output_dir / config_file).exists():
        raise ConfigError(
            f"{output_dir} already holds a run. Continue it with resume=true, or choose another --output."
        )
    name, description = scenario.name, scenario.description
    if run_config["resume"]:
        first = _read_simulation(output_dir)
        if not names and first.get("scenario"):
            name, description = str(first["scenario"]), "continued"
        if begun := str(first.get("command", "")):
            # What it was given anew is part of how the result came about.
            command = f"{begun} && {command}" if names or given.keys() - {"resume", "output-dir"} else begun
    return Request(
        scenario=name,
        description=description,
        engine=engine,
        run_config={**run_config, "output-dir": str(output_dir)},
        num_clients=num_clients,
        client_num_cpus=int(simulation["client-num-cpus"]),
        client_num_gpus=choose_gpu_share(
            float(simulation["client-num-gpus"]),
            num_clients=num_clients,
            client_num_cpus=int(simulation["client-num-cpus"]),
        ),
        output_dir=output_dir,
        command=command,
    )


def _read_started_run(output: Path) -> dict[str, Scalar]:
    """Return the settings of the run in ``output``: its run config and its number of clients."""
    for name in (config_file, simulation_file):
        if not (output / name).is_file():
            raise ConfigError(f"resume=true, but {output} holds no run: it has no {name}. Check --output.")
    settings = _read_table(output / config_file) | _read_simulation(output)
    for name in _origin:
        settings.pop(name, None)
    keys = list_all_keys()
    unknown = [name for name in settings if name not in keys]
    if unknown:
        raise ConfigError(f"{output} holds a run of another release: it has the key {unknown[0]!r}. Start a new run.")
    checked = {name: check_value(keys[name], value) for name, value in settings.items()}
    return {name: value for name, value in checked.items() if name not in ("resume", "output-dir")}


def _read_simulation(output: Path) -> dict[str, Scalar]:
    """Return what :func:`_write_simulation` noted; nothing where there is no such file."""
    path = output / simulation_file
    return _read_table(path) if path.is_file() else {}


def _read_table(path: Path) -> dict[str, Scalar]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): this run cannot be continued.") from error


def choose_gpu_share(wanted: float, *, num_clients: int, client_num_cpus: int) -> float:
    """Return the share of a GPU for one client; below 0, what is there is divided among those that train at once."""
    if wanted >= 0:
        return wanted
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    share = torch.cuda.device_count() / max(1, min(num_clients, cores // client_num_cpus))
    return float(int(share)) if share > 1 else share  # Ray gives out parts of one GPU, or whole ones


def parse_settings(words: Sequence[str]) -> dict[str, Scalar]:
    """Return the settings ``key=value`` by key, each in the type of its key.

    Raises:
        ConfigError: If a key is unknown or given twice, or a value is not allowed.
    """
    keys = list_all_keys()
    settings: dict[str, Scalar] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in keys:
            raise ConfigError(f"Unknown key {name!r}{nearest_match(name, keys)}. See --help for all keys.")
        if name in settings:
            raise ConfigError(f"{name} is given twice: {settings[name]!r} and {text!r}.")
        settings[name] = check_value(keys[name], _parse_value(text, key=keys[name]))
    return settings


def _parse_value(text: str, *, key: Key) -> object:
    """Return the TOML scalar that ``text`` is, or ``text`` itself; a string key takes numbers as they stand."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    if len(parsed) > 1 or not isinstance(value, bool | int | float | str):
        return text
    return text if key.type is str and not isinstance(value, str) else value


def make_sources_absolute(settings: Mapping[str, Scalar], *, base: Path) -> dict[str, Scalar]:
    """Return the settings with sources that exist under ``base``, as a path or a glob, made absolute.

    Raises:
        ConfigError: If a source reads as a local one and does not exist.
    """
    changed = dict(settings)
    for name in _source_keys:
        value = changed.get(name)
        if not isinstance(value, str) or not value or is_package_source(value):
            continue
        path = base / (Path(value).expanduser() if value.startswith("~/") else value)
        if path.exists() or glob.glob(str(path), recursive=True):  # noqa: PTH207 - takes absolute patterns too
            changed[name] = os.path.normpath(path)
        elif is_local_source(value):
            raise ConfigError(f"{name}={value!r} does not exist (working directory: {base}). Check the path.")
    return changed


def _choose_output_dir(scenario: str) -> Path:
    moment = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{scenario}-{moment}"


def _run_on_ray(request: Request) -> None:
    from simulations.launcher import run_on_ray

    run_on_ray(
        app_dir=Path(__file__).resolve().parents[1],
        run_config=request.run_config,
        num_clients=request.num_clients,
        client_num_cpus=request.client_num_cpus,
        client_num_gpus=request.client_num_gpus,
        output_dir=request.output_dir,
        environment=_environment_of(request),
    )


def _run_in_process(request: Request) -> None:
    from ot_federated.data_owner.client_app import app as client_app
    from ot_federated.model_owner.server_app import app as server_app
    from simulations.in_process import run_in_process

    request.output_dir.mkdir(parents=True, exist_ok=True)
    cache_dir = request.output_dir / "client-cache"
    busy = False
    with _set_environment(_environment_of(request) | {"OT_FEDERATED_BUNDLE_CACHE": str(cache_dir)}):
        try:
            run_in_process(server_app, client_app, run_config=request.run_config, num_clients=request.num_clients)
        except OtFederatedError as error:
            busy = isinstance(error, BusyRunError)
            raise
        except Exception as error:
            log_path = request.output_dir / "simulation.log"
            log_path.write_text(traceback.format_exc(), encoding="utf-8")
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise OtFederatedError(f"The run failed: {reason}\nThe traceback is in {log_path}.") from error
        finally:
            # Where another process is at work on the run, the cache is that one's.
            if not busy:
                shutil.rmtree(cache_dir, ignore_errors=True)


def _environment_of(request: Request) -> dict[str, str]:
    return {
        "OT_FEDERATED_SCENARIO": request.scenario,
        "OT_FEDERATED_COMMAND": request.command,
        "OT_FEDERATED_ENGINE": request.engine,
        # A simulation spends the privacy of nobody: its ledgers are its own.
        "OT_FEDERATED_LEDGERS": str(request.output_dir / "ledgers"),
    }


@contextlib.contextmanager
def _set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
