"""# New sequences, or a new champion -> refit of the champion -> lists for all users

Starts when a night announces a new version of `gold.sequences`, or the gate a new champion.

1. `refit`: the champion's recipe is trained on everything (in the pool `gpu`; skipped with
   `[training] refit = false`).
2. `verify`: the served model must answer as it was stored.
3. `score`: `gold.recommendations` is written.
4. `report`: the page is made again, with the lists.

Without a champion it does nothing.

**What went red?**

| task | means | do |
|---|---|---|
| `is_there_a_champion` | MLflow did not answer | start MLflow; clear the task |
| `refit` | its log has the cause; the model that was served before is still served | fix it and clear: it continues where it stopped |
| `verify` | the log names the lists that differ | `python -m models rollback` serves the previous champion |
| `score` | its log has the cause; lists that break the suite are not published, and the table stays as it was | fix it and clear |
| `report` | MLflow did not answer, or the newest comparison was deleted; the lists are published | start MLflow; clear |

Running again is safe: the same versions are written once.
"""

from airflow.sdk import DAG

from sessionmill_dags import alarms, dag_factory

for source in dag_factory.sources():
    with DAG(
        f"score_daily.{source.name}",
        schedule=source.sequences | source.champion,
        start_date=dag_factory.LONG_AGO,
        catchup=False,
        max_active_runs=1,
        default_args=dag_factory.PATIENCE,
        deadline=alarms.deadline(source.spec.serving.deadline_hours, "the lists"),
        doc_md=__doc__,
        tags=["sessionmill", source.name],
    ):
        dag_factory.score(source)
