"""# Sunday's maintenance

Packs the nights' small files, removes what no version needs any more and what killed runs left,
and reports what it freed. It keeps everything of the last `keep_days` days, every version of
`gold.sequences` that a registered model was trained on, and what a derived table has not read yet.

**It went red?** Most likely MLflow did not answer. The registry is needed to know which versions its models
use, so nothing was removed. Start MLflow and clear the task. It can wait for days.
"""

from airflow.sdk import DAG, CronDataIntervalTimetable

from sessionmill_dags import dag_factory

for source in dag_factory.sources():
    with DAG(
        f"maintenance.{source.name}",
        schedule=CronDataIntervalTimetable("0 5 * * 0", timezone="UTC"),
        start_date=dag_factory.LONG_AGO,
        catchup=False,
        max_active_runs=1,
        params=dag_factory.KEEP_DAYS_PARAM,
        default_args=dag_factory.PATIENCE,
        doc_md=__doc__,
        tags=["sessionmill", source.name],
    ):
        dag_factory.maintain(source)
