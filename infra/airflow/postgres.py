"""A PostgreSQL of this machine's own for Airflow's and MLflow's databases, on loopback.

The server is the one that Debian's package `postgresql` brings (or whatever `initdb` is found);
its data, its password and its log belong to one state folder. PostgreSQL does not run as root, so
there root's server runs as the package's user, and the state folder has a link to its data, which
are where that user can reach them.
"""

from __future__ import annotations

import getpass
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

USER = "sessionmill"
DATABASES = ("sessionmill_airflow", "sessionmill_mlflow")
FOR_ROOT = Path("/var/lib/sessionmill")


class NoPostgres(RuntimeError):
    """There is no server here, or none can be reached; the message says how to get one."""


def binary(name: str) -> str:
    """One of PostgreSQL's programs: on the path, or where Debian's package has the newest.

    Raises:
        NoPostgres: there is none.
    """
    found = shutil.which(name)
    if found:
        return found
    installed = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4])
    )
    if not installed:
        raise NoPostgres(
            f"{name} is not here: install PostgreSQL's server (Debian: apt install postgresql), or "
            "give the URL of one: DB=postgresql://user:password@host:5432"
        )
    return str(installed[-1])


def account() -> str | None:
    """Who runs the server: None is who we are."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise NoPostgres("PostgreSQL does not run as root, and there is no user postgres or nobody")


def data_folder(state: Path) -> Path:
    """Where the server's files are; a state folder made anew never meets an older one's.

    Raises:
        NoPostgres: they have been removed, and the state folder has not.
    """
    link = state / "postgres"
    if account() and not link.is_symlink():
        FOR_ROOT.mkdir(mode=0o755, parents=True, exist_ok=True)
        state.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tempfile.mkdtemp(prefix="postgres-", dir=FOR_ROOT))
    if link.is_symlink() and not link.exists():
        raise NoPostgres(
            f"PostgreSQL's data are gone from {link.readlink()}: put them back, or remove {link} "
            "to begin with an empty database"
        )
    return link.resolve()


def password(state: Path) -> str:
    """Made once, kept in the state folder for its owner's eyes only."""
    file = state / "secrets" / "postgres"
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_hex(24))
    return file.read_text()


def create(state: Path) -> None:
    """Make the server's files, where there are none yet."""
    folder, user = data_folder(state), account()
    if (folder / "PG_VERSION").exists():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user:
        shutil.chown(folder, user)
    with tempfile.NamedTemporaryFile("w", dir=folder.parent) as file:  # for the owner's eyes only
        file.write(password(state) + "\n")
        file.flush()
        if user:
            shutil.chown(file.name, user)
        done = subprocess.run(
            [binary("initdb"), "--pgdata", str(folder), "--username", USER, "--auth",
             "scram-sha-256", "--pwfile", file.name, "--encoding", "UTF8", "--locale", "C.UTF-8",
             "--no-sync"],
            text=True, capture_output=True, user=user, cwd=folder, check=False,
        )  # fmt: skip
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise NoPostgres(f"initdb failed: {done.stderr.strip()}")


def command(state: Path, port: int) -> dict[str, Any]:
    """What `subprocess.Popen` needs to run the server in the foreground, on loopback alone."""
    folder = data_folder(state)
    return {
        "args": [
            binary("postgres"), "-D", str(folder), "-p", str(port), "-h", "127.0.0.1",
            "-c", "unix_socket_directories=",
        ],
        "user": account(), "cwd": folder,
    }  # fmt: skip


def own_url(state: Path, port: int) -> str:
    return f"postgresql://{USER}:{password(state)}@127.0.0.1:{port}"


def is_up(url: str) -> bool:
    """Whether the server takes our password."""
    import psycopg2

    try:
        psycopg2.connect(f"{url}/postgres", connect_timeout=3).close()
    except psycopg2.OperationalError:
        return False
    return True


def create_databases(url: str) -> dict[str, str]:
    """Airflow's and MLflow's databases, made where they are missing; their URLs.

    Raises:
        NoPostgres: the server cannot be reached, or lets us make no database.
    """
    import psycopg2
    from psycopg2 import sql

    try:
        connection = psycopg2.connect(f"{url}/postgres", connect_timeout=10)
    except psycopg2.Error as error:
        raise NoPostgres(f"PostgreSQL does not let us in: {error}") from None
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            there = {name for (name,) in cursor.fetchall()}
            for name in DATABASES:
                if name not in there:
                    cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    except psycopg2.Error as error:
        raise NoPostgres(
            f"{getpass.getuser()} cannot make the databases {', '.join(DATABASES)}: {error}"
        ) from None
    finally:
        connection.close()
    base = url.replace("postgresql://", "postgresql+psycopg2://", 1).rstrip("/")
    return dict(zip(("airflow", "mlflow"), (f"{base}/{name}" for name in DATABASES), strict=True))


def remove(state: Path) -> None:
    """Forget the server's files."""
    link = state / "postgres"
    shutil.rmtree(link.resolve(), ignore_errors=True)
    if link.is_symlink():
        link.unlink()
