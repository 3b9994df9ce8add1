"""# Once a week: every method trained -> compared -> registered -> the gate

Starts once a week on the newest version of `gold.sequences`, unless all methods were trained on it
before. With `[training] nightly = true` it also starts when a night announces a new version. All
methods train on one version: the highest that was announced since the last training started. When
it is switched on, it starts once for all weeks that passed. One task per method and seed; the pool
`gpu` says how many run at a time.

**What went red?**

| task | means | do |
|---|---|---|
| `recipes` (where `[training] tuned = true`) | a method has no recipe for this target and preset: nothing was trained | run the commands that its log names, then clear the task |
| `train [method, seed]` | only this method failed: the others continue, and the comparison names the missing one | read its log; clear the task, then `compare` |
| `compare` | no method finished, or MLflow did not answer | start MLflow; clear the task |
| `register`, `promote`, `report` | MLflow did not answer | start MLflow; clear the task |

A gate that refuses is not red: `promote` returns the reason (as do the version's tags in MLflow), and
`announce_champion` is skipped. The task `report` has a button that opens the page.

To run it by hand, trigger it with other methods, seeds, a preset, or an older `table_version`.
"""

from airflow.sdk import DAG

from sessionmill_dags import alarms, dag_factory

for source in dag_factory.sources():
    with DAG(
        f"train_methods.{source.name}",
        schedule=source.retrained,
        catchup=False,
        max_active_runs=1,
        params=dag_factory.training_params(source),
        default_args=dag_factory.PATIENCE,
        deadline=alarms.deadline(source.spec.training.deadline_hours, "a training"),
        doc_md=__doc__,
        tags=["sessionmill", source.name],
    ):
        compared = dag_factory.compare(source)
        gate = dag_factory.promote(source)
        dag_factory.train_each(source) >> compared >> dag_factory.register(source) >> gate
        [compared, gate] >> dag_factory.report(source)
