"""# New sequences, or a new champion -> refit of the champion -> lists for all users

Starts when a night announces a new version of `gold.sequences`, or the gate a new champion. The
champion's recipe is trained on everything (`refit`, in the pool `gpu`; not with `[training] refit =
false`), the model that is served is asked whether it answers as it was stored (`verify`), and
`gold.recommendations` is written; then the page is made anew, with the lists. Without a champion it
does nothing.

**It went red?** `is_there_a_champion`: MLflow did not answer. `refit`: its log says what; it goes on
where it was, and what was served before is still served. `verify`: the log says which lists differ;
`python -m models rollback` serves the champion before. `score`: its log says what; a list that breaks
the suite is not published, and the table stays as it was. Clear the task: teaching and scoring again
from the same versions writes nothing twice. `report`: MLflow did not answer, or the newest comparison
was deleted; the lists are published.
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
