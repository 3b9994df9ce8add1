"""# A night: landing files -> events -> sessions -> items -> sequences

Each table is computed as a candidate, audited, and only then published: **no reader ever sees rows
that failed their audit**, and a red task leaves every table at its last good version.

**What went red?**

| task | means | do |
|---|---|---|
| `arrived` | the day's files have not come (only where `landing` has `{day}`) | have them delivered and clear the task; if nothing is to come, mark it as a success |
| `events.compute` | files could not be read, or a column vanished or changed its type | the log's last lines name column, file and remedy; fix the file or the source file, clear the task |
| `*.audit` | rows break an invariant (*failed*), or the suite could not run (*errored*): the log says which, and names rows and the candidate's folder | fix the cause, clear the group from `compute` |
| `*.publish` | another run changed the table meanwhile (it tries again by itself), or storage is full | clear the group from `compute` |
| `drift` | the night is unlike those before it, and the source's policy is `stop`; its tables are published | the log has the numbers: right after all? mark it as a success; else have the files delivered again and clear from `events.compute` |
| `lists` | what yesterday's lists were worth could not be counted (a night without lists is skipped, green) | the log says why; mark it as a success if models must not wait for it |
| `announce` | the tables are right; only the announcement to training failed | clear the task |

Clearing and running again is always safe: every job is idempotent, in any order of days. A night
that found nothing new writes no version and starts no training. To load a day again by hand,
trigger this DAG with `day`. Rejected lines are in `bronze.rejects` with file, line and reason.
"""

from airflow.sdk import DAG

from sessionmill_dags import alarms, dag_factory

for source in dag_factory.sources():
    with DAG(
        f"sessions_daily.{source.name}",
        schedule=source.schedule,
        start_date=source.start_date,
        catchup=source.catchup,
        max_active_runs=1,
        params=dag_factory.DAY_PARAM,
        default_args=dag_factory.PATIENCE,
        deadline=alarms.deadline(source.spec.schedule.deadline_hours, "a night"),
        doc_md=__doc__,
        tags=["sessionmill", source.name],
    ):
        events = dag_factory.write_audit_publish(source, "events", "ingest")
        sessions = dag_factory.write_audit_publish(source, "sessions", "sessionize")
        items = dag_factory.spark_job(source, "items")
        sequences = dag_factory.write_audit_publish(source, "sequences", "sequences")
        drifted = dag_factory.drift(source)
        judged = dag_factory.lists(source)
        announced = dag_factory.announce(source, "sequences.publish.json")

        if awaited := dag_factory.arrived(source):
            awaited >> events
        events >> [sessions, items] >> sequences >> [drifted, judged] >> announced
