"""Airflow's and MLflow's databases in a PostgreSQL of this machine's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.airflow_tools import (
    REPO,
    SOURCE,
    airflow,
    at_once,
    last_night,
    local,
    said,
    write_log,
)  # fmt: skip
from tests.support.database_tools import launched


@pytest.fixture(scope="module")
def server() -> Any:
    """infra/airflow/postgres.py; skips where there is no PostgreSQL."""
    local()
    import postgres  # (infra/airflow is on the path, now)

    try:
        postgres.binary("initdb")
    except postgres.NoPostgres as error:
        pytest.skip(str(error))
    return postgres


@pytest.fixture
def state(tmp_path: Path, server: Any) -> Iterator[Path]:
    yield tmp_path / "state"
    local().stop(tmp_path / "state")
    server.remove(tmp_path / "state")


def test_a_server_of_our_own_comes_and_goes_and_keeps_what_it_has(server: Any, state: Path) -> None:
    import psycopg2

    port = local().free_port()
    url = launched(server, state, port)
    urls = server.create_databases(url)
    assert urls["airflow"].startswith("postgresql+psycopg2://sessionmill:")
    with psycopg2.connect(f"{url}/sessionmill_airflow") as connection:
        connection.cursor().execute("CREATE TABLE kept (a int)")
    connection.close()

    [entry] = local().record(state)
    process = psutil.Process(entry["pid"])
    assert {c.laddr.ip for c in process.net_connections() if c.status == "LISTEN"} == {"127.0.0.1"}
    assert server.password(state) not in " ".join(process.cmdline())
    assert (state / "secrets" / "postgres").stat().st_mode & 0o777 == 0o600
    assert not server.is_up(url.replace(server.password(state), "guessed"))
    with pytest.raises(server.NoPostgres, match="does not let us in"):
        server.create_databases(url.replace(server.password(state), "guessed"))

    # Killed, and ended well: what was written is there.
    process.kill()
    psutil.wait_procs([process], timeout=20)
    for _ in range(2):
        launched(server, state, port)
        assert server.create_databases(url) == urls
        with psycopg2.connect(f"{url}/sessionmill_airflow") as connection:
            connection.cursor().execute("SELECT a FROM kept")
        connection.close()
        assert local().stop(state) >= 1 and local().processes(state) == []
        assert not server.is_up(url)


def test_a_state_folder_made_anew_has_a_database_of_its_own(server: Any, state: Path) -> None:
    folders = []
    for _ in range(2):  # the second has another password, and must not meet the first's data
        url = launched(server, state, local().free_port())
        assert server.create_databases(url)
        local().stop(state)
        folders.append(server.data_folder(state))
        shutil.rmtree(state)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="the data are in the state folder itself")
def test_data_that_are_gone_are_not_made_anew_in_silence(server: Any, state: Path) -> None:
    shutil.rmtree(server.data_folder(state))
    with pytest.raises(server.NoPostgres, match=r"are gone from /var/lib/.*put them"):
        server.create(state)


def test_a_database_that_is_no_postgresql_is_refused(server: Any, state: Path) -> None:
    with pytest.raises(server.NoPostgres, match="write sqlite, postgres, or postgresql://"):
        local().start(state, database="mysql://somewhere")


TWO = """
[training]
nightly = false

[schedule]
start = {night}
"""


@pytest.mark.long
def test_two_sources_nights_side_by_side_and_a_job_by_hand_between_them(
    server: Any, tmp_path: Path
) -> None:
    night = last_night()
    sources = {}
    for name, users in (("left", 40), ("right", 60)):
        write_log(tmp_path / "landing" / name, night, users=users, days=6)
        sources[name] = SOURCE.format(name=name, landing=tmp_path / "landing")
        sources[name] += TWO.format(night=f"{night:%Y-%m-%d}")
    try:
        with airflow(tmp_path, sources, {}, database="postgres") as there:
            there.unpause("sessions_daily.left", "sessions_daily.right")
            while not there.runs("sessions_daily.left"):
                time.sleep(1)
            by_hand = subprocess.run(
                [sys.executable, "-m", "jobs", "run", "--source", f"{tmp_path}/sources/left.toml"],
                cwd=REPO, env=os.environ | there.env | {"SESSIONMILL_LAKE": str(there.lake)},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert by_hand.returncode == 0, by_hand.stderr[-3000:]
            # The database goes away in the middle and comes back, as at an upgrade; some of the
            # servers end for it, at once or later.
            base = there.server("postgres")
            base.send_signal(signal.SIGINT)
            base.wait(30)
            time.sleep(10)
            launched(server, there.state, there.servers.database_port)
            with there.supervised("mlflow", "api-server", "scheduler", "dag-processor"):
                when = []
                for name in sources:
                    run, _ = there.ended(f"sessions_daily.{name}", 1200, trouble=True)
                    assert run["state"] == "success"
                    when.append((run["start_date"], run["end_date"]))
                    assert said(there.lake, name) == at_once(there, name)
            (began, ended), (other_began, other_ended) = when
            assert began < other_ended and other_began < ended  # side by side
            # It is PostgreSQL that knows all that.
            import psycopg2

            url = server.own_url(there.state, there.servers.database_port)
            with psycopg2.connect(f"{url}/sessionmill_airflow") as connection:
                cursor = connection.cursor()
                cursor.execute("SELECT count(*) FROM dag_run WHERE state = 'success'")
                assert cursor.fetchone() == (2,)
            connection.close()
    finally:
        server.remove((tmp_path / "state").resolve())
