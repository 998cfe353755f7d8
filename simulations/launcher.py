"""The Ray engine: Flower's own SuperLink and CLI, private to one run.

``flwr run`` on its own uses one SuperLink per machine on fixed ports, leaves it running, and ends with status 0
when the run failed. Here every run has a SuperLink of its own on a free port, a temporary ``FLWR_HOME``, and an
end: whatever was started is gone afterwards, whether the run succeeded, failed, was interrupted or killed.

What the ServerApp writes appears within a second: Flower collects it every 0.2 s and hands it out every 0.5 s.
"""

from __future__ import annotations

import codecs
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ot_federated.errors import OtFederatedError
from simulations.flower_output import AppOutput
from simulations.processes import guard_run, token_variable

Scalar = bool | int | float | str

failure_file_name = "failure.txt"
log_file_name = "simulation.log"
cache_dir_prefix = "client-cache-"
start_seconds = 60.0


class SimulationError(OtFederatedError):
    """A simulation could not start, or its run failed."""


@dataclass(frozen=True, kw_only=True)
class _Flower:
    """A private SuperLink: where it lives, where it listens, and the environment of everything it starts."""

    home: Path
    port: int
    environment: Mapping[str, str]

    @property
    def work_dir(self) -> Path:
        """A neutral directory: from the app's own, Ray's workers would import the checkout, not the bundle."""
        return self.home / "work"


def run_on_ray(
    *,
    app_dir: Path,
    run_config: Mapping[str, Scalar],
    num_clients: int,
    client_num_cpus: int,
    client_num_gpus: float,
    output_dir: Path,
    environment: Mapping[str, str],
) -> None:
    """Run the Flower app in ``app_dir`` with simulated clients on Ray, and return when it has succeeded.

    Args:
        app_dir: The directory of the app's ``pyproject.toml``.
        run_config: Flat keys that override the app's defaults.
        num_clients: Simulated clients.
        client_num_cpus: CPUs, and threads, of one client. As many clients run at once as fit.
        client_num_gpus: Share of a GPU that one client takes; at 0 clients see no GPU.
        output_dir: Receives ``simulation.log``; the app may leave ``failure.txt`` here.
        environment: Variables that both apps see, besides those of this process.

    Raises:
        SimulationError: If Flower or Ray does not start, or the run fails; the message says why.
    """
    num_cpus = _plan_cpus(num_clients, client_num_cpus=client_num_cpus)
    federation: dict[str, Scalar] = {
        "num-supernodes": num_clients,
        "client-resources-num-cpus": client_num_cpus,
        "client-resources-num-gpus": float(client_num_gpus),
        "init-args-num-cpus": num_cpus,
        "init-args-logging-level": "ERROR",
        "init-args-log-to-driver": True,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / failure_file_name).unlink(missing_ok=True)
    token = uuid.uuid4().hex
    home = Path(tempfile.mkdtemp(prefix="otf-", dir=_short_temp_dir()))
    # Each start has its own: what ends removes it, also a start that was refused while the run is still at work.
    cache_dir = output_dir / f"{cache_dir_prefix}{token[:8]}"
    with guard_run(token, directories=[home, cache_dir]):
        variables = _build_environment(home) | {
            **environment,
            token_variable: token,
            "OT_FEDERATED_BUNDLE_CACHE": str(cache_dir),
        }
        flower = _start_superlink(home, variables)
        run_config_file = home / "run-config.toml"
        run_config_file.write_text(to_toml(run_config), encoding="utf-8")
        _run_and_show(flower, app_dir=app_dir, run_config=run_config_file, federation=federation, output_dir=output_dir)
        _check_success(flower, output_dir=output_dir)


def to_toml(values: Mapping[str, Scalar]) -> str:
    """Return flat keys and scalars as TOML, whatever characters they hold.

    Raises:
        SimulationError: If an integer does not fit into 64 bits, the widest that Flower passes on.
    """
    lines = []
    for key, value in values.items():
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, str):
            text = _quote(value)
        else:
            text = repr(value)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise SimulationError(f"{key}={value} is too large: integers have at most 64 bits.")
        lines.append(f"{_quote(key)} = {text}\n")
    return "".join(lines)


def _quote(text: str) -> str:
    # JSON escapes all that TOML wants escaped but DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _plan_cpus(num_clients: int, *, client_num_cpus: int) -> int:
    """Return the CPUs that Ray may hand out: no more workers than clients, since each costs memory."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if client_num_cpus > available:
        raise SimulationError(
            f"client-num-cpus={client_num_cpus} but this machine offers {available}: no client would ever run. "
            f"Give at most {available}."
        )
    return min(available, num_clients * client_num_cpus)


def _short_temp_dir() -> str | None:
    # Ray puts UNIX sockets under this directory; their paths may have 107 characters at most.
    return "/tmp" if os.name == "posix" and os.access("/tmp", os.W_OK) else None


def _build_environment(home: Path) -> dict[str, str]:
    environment = dict(os.environ)
    # These would point Ray or Flower at somebody else's cluster or services.
    for name in ("RAY_ADDRESS", "FLWR_LOG_LEVEL", "FLWR_DATABASE", "FLWR_ENABLE_EVENT_LOG"):
        environment.pop(name, None)
    no_proxy = ",".join(filter(None, [environment.get("NO_PROXY") or environment.get("no_proxy"), "127.0.0.1"]))
    # The SuperLink starts further commands by name.
    path = os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), environment.get("PATH")]))
    return environment | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_TMPDIR": str(home),
        # Ray announces a change of its defaults here, in the middle of the app's output.
        "PYTHONWARNINGS": ",".join(
            filter(None, [environment.get("PYTHONWARNINGS"), "ignore::FutureWarning:ray._private.worker"])
        ),
        # Processes outnumber cores here: a thread that waits must not spin. (Ray gives each worker
        # OMP_NUM_THREADS = client-num-cpus; the ServerApp keeps all cores.)
        "OMP_WAIT_POLICY": environment.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": str(shutil.get_terminal_size().columns),
        "PATH": path,
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }


def _find_command(name: str) -> str:
    command = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if command is None:
        raise SimulationError(f"The command {name} is missing: install this project with pip install -e .")
    return command


def _start_superlink(home: Path, environment: Mapping[str, str]) -> _Flower:
    log_path = home / "superlink.log"
    for _ in range(3):  # another process may take the free port first
        flower = _Flower(home=home, port=_find_free_port(), environment=environment)
        flower.work_dir.mkdir(exist_ok=True)
        address = f'address = "127.0.0.1:{flower.port}"\ninsecure = true\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "run"\n\n[superlink.run]\n{address}')
        command = [_find_command("flower-superlink"), "--simulation", "--insecure", "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", str(flower.port)]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=flower.work_dir,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if _wait_until_healthy(process, port=flower.port):
            return flower
    raise SimulationError(f"Flower's SuperLink did not start. It said:\n{_last_lines(log_path)}")


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], *, port: int) -> bool:
    deadline = time.monotonic() + start_seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return True
        time.sleep(0.1)
    return False


def _run_and_show(
    flower: _Flower,
    *,
    app_dir: Path,
    run_config: Path,
    federation: Mapping[str, Scalar],
    output_dir: Path,
) -> None:
    """Submit the run and show the app's output until the run is over; all output goes to ``simulation.log``."""
    settings = " ".join(f"{key}={_quote(v) if isinstance(v, str) else str(v).lower()}" for key, v in federation.items())
    command = [_find_command("flwr"), "run", str(app_dir), "run", "--stream"]
    command += ["--run-config", str(run_config), "--federation-config", settings]
    shown = AppOutput()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with (
        (output_dir / log_file_name).open("ab") as log,
        subprocess.Popen(
            command,
            cwd=flower.work_dir,
            env=dict(flower.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as stream,
    ):
        assert stream.stdout is not None
        try:
            while chunk := os.read(stream.stdout.fileno(), 65536):
                log.write(chunk)
                log.flush()
                _show(shown.feed(decoder.decode(chunk)))
            _show(shown.flush())
        except BaseException:  # leaving the block waits for the process
            stream.kill()
            raise


def _show(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _check_success(flower: _Flower, *, output_dir: Path) -> None:
    command = [_find_command("flwr"), "list", "run", "--format", "json"]
    listing = subprocess.run(
        command, cwd=flower.work_dir, env=dict(flower.environment), capture_output=True, text=True, check=False
    )
    try:
        run = json.loads(listing.stdout)["runs"][0]
        status, details = run["status"], run["status-details"]
    except (ValueError, LookupError):
        status, details = "not started", ""
    if status == "finished:completed":
        return
    failure = output_dir / failure_file_name
    if failure.is_file():
        raise SimulationError(failure.read_text(encoding="utf-8").strip())
    log_path = output_dir / log_file_name
    if "heartbeat" in details:
        reason = "its process ended without a word, most often because memory ran out. Try fewer clients at once."
    elif details not in ("", "N/A"):
        reason = details
    else:
        reason = f"its output ends with\n{_last_lines(log_path)}"
    raise SimulationError(f"The run failed ({status}): {reason}\nAll output is in {log_path}.")


def _last_lines(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return "\n".join(f"  {line}" for line in lines[-12:]) or "  (nothing)"
