"""# The history, in one go

Loads everything that is in the landing folder and not in the tables (`jobs run` without a day), so
nothing is late. One task, one Spark application, audits included. Start it by hand, once, before
the first night. Running it again is safe: files that were read before are recognised.

**It went red?** The last lines of the log name the cause, the place and the fix. Fix it and clear the task.
"""

from airflow.sdk import DAG

from sessionmill_dags import dag_factory

for source in dag_factory.sources():
    with DAG(
        f"load_history.{source.name}",
        schedule=None,
        start_date=dag_factory.LONG_AGO,
        max_active_runs=1,
        default_args=dag_factory.PATIENCE,
        doc_md=__doc__,
        tags=["sessionmill", source.name],
    ):
        history = dag_factory.spark_job(source, "run", by_day=False)
        announced = dag_factory.announce(source, "run.all.json")

        history >> announced
