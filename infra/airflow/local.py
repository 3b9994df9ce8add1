"""Airflow and MLflow on this machine, for the demo, the tests and for clicking around.

    python infra/airflow/local.py start|stop|status [--state FOLDER] [--database sqlite|postgres|URL]
        [--airflow-port N] [--mlflow-port N]

The real components: scheduler, dag-processor and api-server with the LocalExecutor, and an MLflow
server; their databases are SQLite files, or in a PostgreSQL of this machine's own, or in a given one.
Everything listens on 127.0.0.1 only and keeps its files, its secrets and its process ids in one
state folder, so that a killed run is found and cleaned up
by the next one. Who can reach this machine's loopback is an administrator: not for production.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # imported by its file's path, too
import postgres
from processes import (
    REPO,
    dead,
    launch,
    log_tail,
    processes,
    record,
    stop,
    write,
)

__all__ = ["Api", "NotHealthy", "Servers", "free_port", "launch", "processes", "record", "stop"]


def training_slots() -> int:
    """GPUs of this machine, by their device files; where there is none, its cores."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or os.cpu_count() or 1


POOLS = {
    "spark": (
        2,
        "Spark applications at a time. Starting one is half its life on a small log, and uses one "
        "core.",
    ),
    "gpu": (
        training_slots(),
        "As many slots as training devices; without one, a slot a core, one thread each.",
    ),
}
HEALTHY_WITHIN_S = 300
# For many short Spark applications (the demo's nights, tests): an application that lives for half a
# minute spends its time compiling, and checking the byte code of jars whose sums were checked when they
# were fetched. Measured of the first two: 40 % less processor time. Not for big logs.
SHORT_LIVED_JVM = {
    "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC "
    "-XX:+UnlockDiagnosticVMOptions -XX:-BytecodeVerificationRemote",
}


class NotHealthy(RuntimeError):
    """A server did not come up, or went away; the message has its log."""


@dataclass(frozen=True)
class Servers:
    """Where the servers of one state folder are."""

    state: str
    lake: str
    airflow_port: int
    mlflow_port: int
    database: str = "sqlite"
    """sqlite, postgres (our own), or given (its URL is a secret)."""
    database_port: int | None = None

    @property
    def airflow(self) -> str:
        return f"http://127.0.0.1:{self.airflow_port}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def home(self) -> Path:
        return Path(self.state) / "airflow"

    @classmethod
    def load(cls, state: Path) -> Servers | None:
        file = state / "servers.json"
        return cls(**json.loads(file.read_text())) if file.exists() else None

    def save(self) -> None:
        write(Path(self.state) / "servers.json", json.dumps(asdict(self), indent=1))


def default_state() -> Path:
    """The demo's state where there was a demo, so that its runs and models are shown."""
    demo = REPO / ".demo"
    return demo if (demo / "servers.json").exists() else REPO / ".run"


def free_port(preferred: int | None = None) -> int:
    for port in [preferred, 0] if preferred else [0]:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port or 0))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


# -- the environment of the servers ------------------------------------------------------------


def _secret(state: Path, name: str) -> str:
    file = state / "secrets" / name
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write(file, secrets.token_hex(48), mode=0o600)
    return file.read_text()


def database_urls(servers: Servers) -> dict[str, str]:
    """Airflow's and MLflow's databases. For PostgreSQL, made where they are missing.

    Raises:
        postgres.NoPostgres: it cannot be reached.
    """
    state = Path(servers.state)
    if servers.database == "sqlite":
        return {
            "airflow": f"sqlite:///{servers.home / 'airflow.db'}",
            "mlflow": f"sqlite:///{state / 'mlflow' / 'mlflow.db'}",
        }
    if servers.database == "postgres":
        assert servers.database_port is not None
        return postgres.create_databases(postgres.own_url(state, servers.database_port))
    return postgres.create_databases((state / "secrets" / "database").read_text())


def environment(servers: Servers) -> dict[str, str]:
    """What the servers and the tasks that they start see; the caller's own settings win."""
    state, urls = Path(servers.state), database_urls(servers)
    bin_folder = Path(sys.prefix) / "bin"
    ours = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPO / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "2",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "120",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "60",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW_CONN_SPARK_DEFAULT": json.dumps(
            {
                "conn_type": "spark",
                "host": os.environ.get("SESSIONMILL_SPARK_MASTER") or "local[*]",
                "extra": {"deploy-mode": "client"},
            }
        ),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GX_ANALYTICS_ENABLED": "false",
        "SPARK_LOCAL_IP": "127.0.0.1",
        # Trainings run side by side, one a slot: two threads each on two cores were several times
        # slower than one each.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // training_slots())),
        "SESSIONMILL_LAKE": servers.lake,
    }
    fixed = {
        "AIRFLOW_HOME": str(servers.home),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(servers.airflow_port),
        "AIRFLOW__API__BASE_URL": servers.airflow,
        "AIRFLOW__API__SECRET_KEY": _secret(state, "api"),
        "AIRFLOW__API_AUTH__JWT_SECRET": _secret(state, "jwt"),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{servers.airflow}/execution/",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": urls["airflow"],
        "MLFLOW_BACKEND_STORE_URI": urls["mlflow"],  # (a command line is for all to see)
        "MLFLOW_TRACKING_URI": servers.mlflow,
        # the operator finds `spark-submit` there, and tasks this environment's Python
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONUNBUFFERED": "1",
        # A process that gives itself a title leaves its environment readable: `processes` looks.
        "SPT_NOENV": "1",
    }
    return ours | dict(os.environ) | fixed


def commands(servers: Servers) -> dict[str, list[str]]:
    bin_folder = Path(sys.prefix) / "bin"
    airflow, mlflow = str(bin_folder / "airflow"), str(bin_folder / "mlflow")
    store = Path(servers.state) / "mlflow"
    return {
        "mlflow": [
            mlflow, "server", "--host", "127.0.0.1", "--port", str(servers.mlflow_port),
            "--workers", "1", "--artifacts-destination", str(store / "artifacts"),
        ],
        "api-server": [airflow, "api-server"],
        # logs are read from the folder: the log server would listen on every interface
        "scheduler": [airflow, "scheduler", "--skip-serve-logs"],
        "dag-processor": [airflow, "dag-processor"],
    }  # fmt: skip


# -- health ------------------------------------------------------------------------------------


def get_json(url: str, timeout: float = 10) -> Any:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        body = answer.read()
    return json.loads(body) if body.startswith((b"{", b"[")) else body.decode()


def _answers(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except (OSError, ValueError, KeyError, urllib.error.URLError):
        return False


def unhealthy(servers: Servers) -> list[str]:
    """Names of the servers that do not answer, or whose heart does not beat."""
    missing = []
    if not _answers(lambda: get_json(f"{servers.mlflow}/health") == "OK"):
        missing.append("mlflow")
    try:
        health = get_json(f"{servers.airflow}/api/v2/monitor/health")
    except (OSError, ValueError):
        return [*missing, "api-server", "scheduler", "dag-processor"]
    for ours, theirs in (
        ("scheduler", "scheduler"),
        ("dag-processor", "dag_processor"),
    ):
        if health[theirs]["status"] != "healthy":
            missing.append(ours)
    return missing


def wait_until_healthy(servers: Servers, say: Callable[[str], None]) -> None:
    state, began, before = Path(servers.state), time.monotonic(), None
    while missing := unhealthy(servers):
        if missing != before:
            say(f"waiting for {', '.join(missing)} ({time.monotonic() - began:.0f} s)")
            before = missing
        if name := dead(state):
            raise NotHealthy(f"{name} ended:\n{log_tail(state, name)}\n({state}/logs/{name}.log)")
        if time.monotonic() - began > HEALTHY_WITHIN_S:
            name = missing[0]
            raise NotHealthy(
                f"{', '.join(missing)} not healthy after {HEALTHY_WITHIN_S} s; the end of "
                f"{state}/logs/{name}.log:\n{log_tail(state, name)}"
            )
        time.sleep(1)


# -- start -------------------------------------------------------------------------------------


def start(
    state: Path,
    *,
    lake: Path | str | None = None,
    airflow_port: int | None = None,
    mlflow_port: int | None = None,
    database: str | None = None,
    extra_env: dict[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> Servers:
    """Start the servers of a state folder, wait until they are healthy, create the pools.

    What a killed run left behind is ended first. Ports, lake and database are those of the last
    time unless they are given; a port that another program took is replaced by a free one.

    Args:
        database: `sqlite`, `postgres`, or the URL of a PostgreSQL without a database's name.

    Raises:
        NotHealthy: with the end of the log of the server that did not come up.
        postgres.NoPostgres: there is no PostgreSQL here, or it cannot be reached.
    """
    state = state.resolve()
    if left := stop(state):
        say(f"ended {left} processes that an earlier run left")
    before = Servers.load(state)
    lake = lake or os.environ.get("SESSIONMILL_LAKE") or (before.lake if before else "lake")
    servers = Servers(
        state=str(state),
        lake=str(lake) if "://" in str(lake) else os.path.abspath(lake),
        airflow_port=airflow_port or free_port(before.airflow_port if before else 8080),
        mlflow_port=mlflow_port or free_port(before.mlflow_port if before else 5000),
        database=before.database if before else "sqlite",
    )
    if database is not None:
        servers = replace(servers, database=_named(state, database))
    if servers.database == "postgres":
        port = free_port(before.database_port if before and before.database_port else None)
        servers = replace(servers, database_port=port)
    for folder in (servers.home, state / "mlflow" / "artifacts", state / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    for log in (state / "logs").glob("*.log"):
        log.rename(log.with_suffix(".log.1"))
    servers.save()
    todo = commands(servers)
    try:
        if servers.database == "postgres":
            _start_postgres(servers, say)
        env = environment(servers) | (extra_env or {})
        launch(state, "mlflow", todo.pop("mlflow"), env)
        _migrate(servers, env, say)
        for name, command in todo.items():
            launch(state, name, command, env)
        wait_until_healthy(servers, say)
        _create_pools(servers)
    except BaseException:
        stop(state)
        raise
    return servers


def _named(state: Path, database: str) -> str:
    """What kind of database is meant; a URL is kept as a secret."""
    if database in ("sqlite", "postgres"):
        return database
    if not database.startswith("postgresql://"):
        raise postgres.NoPostgres(
            f"database {database!r}: write sqlite, postgres, or postgresql://user:password@host:5432"
        )
    (state / "secrets").mkdir(mode=0o700, parents=True, exist_ok=True)
    write(state / "secrets" / "database", database.rstrip("/"), mode=0o600)
    return "given"


def _start_postgres(servers: Servers, say: Callable[[str], None]) -> None:
    state, port = Path(servers.state), servers.database_port
    assert port is not None
    postgres.create(state)
    how = postgres.command(state, port)
    launch(state, "postgres", how.pop("args"), dict(os.environ), **how)
    say(f"PostgreSQL on 127.0.0.1:{port}")
    deadline = time.monotonic() + 60
    while not postgres.is_up(postgres.own_url(state, port)):
        if dead(state) or time.monotonic() > deadline:
            raise NotHealthy(f"PostgreSQL did not come up:\n{log_tail(state, 'postgres')}")
        time.sleep(0.2)


def _migrate(servers: Servers, env: dict[str, str], say: Callable[[str], None]) -> None:
    """Create or upgrade Airflow's database; skipped where this version did it before."""
    from importlib.metadata import version

    done, wanted = servers.home / "migrated", version("apache-airflow-core")
    if servers.database != "sqlite":
        wanted += f" {servers.database}"
    there = servers.database != "sqlite" or (servers.home / "airflow.db").exists()
    if servers.database != "given" and there and done.exists() and done.read_text() == wanted:
        return
    say("making Airflow's database")
    log = Path(servers.state) / "logs" / "migrate.log"
    with open(log, "ab") as out:
        result = subprocess.run(
            [str(Path(sys.prefix) / "bin" / "airflow"), "db", "migrate"], cwd=REPO, env=env,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False,
        )  # fmt: skip
    if result.returncode:
        raise NotHealthy(f"airflow db migrate failed:\n{log_tail(Path(servers.state), 'migrate')}")
    done.write_text(wanted)


def _create_pools(servers: Servers) -> None:
    api = Api(servers)
    known = {pool["name"] for pool in api.get("/pools")["pools"]}
    for name, (slots, words) in POOLS.items():
        if name not in known:
            api.post("/pools", {"name": name, "slots": slots, "description": words})


ATTEMPTS = 5


class Api:
    """Airflow's REST API, as the administrator that everyone on this loopback is."""

    def __init__(self, servers: Servers) -> None:
        self.root = f"{servers.airflow}/api/v2"
        self._auth, self._state = f"{servers.airflow}/auth/token", servers.state
        self._token: str | None = None

    def call(self, method: str, path: str, body: Any = None) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            if self._token is None:
                self._token = get_json(self._auth)["access_token"]
            request = urllib.request.Request(
                self.root + path,
                method=method,
                data=None if body is None else json.dumps(body).encode(),
                headers={
                    "Authorization": f"Bearer {self._token}",
                    "Content-Type": "application/json",
                },
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code == 401 and attempt == 1:
                    self._token = None  # tokens of a long demo expire
                    continue
                said = error.read().decode(errors="replace")
                if "Database error" in said and method != "POST" and attempt < ATTEMPTS:
                    time.sleep(1)  # SQLite was locked by a scheduler for longer than Airflow waits
                    continue
                raise RuntimeError(f"{method} {path}: {error.code} {said}") from None
            except urllib.error.URLError as error:
                raise NotHealthy(
                    f"Airflow does not answer at {self.root} any more ({error.reason}); "
                    f"{self._state}/logs says why"
                ) from None
        raise AssertionError("unreachable")

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def post(self, path: str, body: Any) -> Any:
        return self.call("POST", path, body)

    def patch(self, path: str, body: Any) -> Any:
        return self.call("PATCH", path, body)


def main() -> int:
    parser = argparse.ArgumentParser(description="Airflow and MLflow on this machine")
    parser.add_argument("action", choices=["start", "stop", "status"])
    parser.add_argument("--state", type=Path, help="state folder; default: .demo if there, or .run")
    parser.add_argument(
        "--airflow-port", type=int, help="default: the last one, 8080, or a free one"
    )
    parser.add_argument(
        "--mlflow-port", type=int, help="default: the last one, 5000, or a free one"
    )
    parser.add_argument(
        "--database", help="sqlite, postgres, or postgresql://user:password@host:5432; default: the "
        "last one, or sqlite",
    )  # fmt: skip
    args = parser.parse_args()
    state = (args.state or default_state()).resolve()

    if args.action == "stop":
        count = stop(state)
        print(f"stopped {count} processes of {state}" if count else "nothing was running")
        return 0
    running = Servers.load(state) if processes(state) else None
    same = not (args.airflow_port or args.mlflow_port or args.database)
    if args.action == "start" and same and running and not unhealthy(running):
        print("they are running already: `make down` first, to restart them")
    elif args.action == "start":
        print(f"starting Airflow and MLflow (state and logs in {state}) ...", flush=True)
        try:
            start(
                state, airflow_port=args.airflow_port, mlflow_port=args.mlflow_port,
                database=args.database or None,
            )  # fmt: skip
        except (NotHealthy, postgres.NoPostgres) as error:
            print(error, file=sys.stderr)
            return 1
    servers = Servers.load(state)
    if servers is None or (missing := unhealthy(servers)):
        print(f"not running: {', '.join(missing) if servers else 'never started'} ({state})")
        return 1
    print(f"Airflow  {servers.airflow}\nMLflow   {servers.mlflow}\nlake     {servers.lake}")
    print("`make down` stops them.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
