"""# Once a week: every method trained -> compared -> registered -> the gate

Starts once a week on the newest version of `gold.sequences`, unless all were trained on it before;
with `[training] nightly = true` also when a night announces a new one. All methods train on one version: the highest of those that
were announced since the last training started. Switched on, it starts once for the weeks that
passed. One task per method and seed, as many at a time as the pool `gpu` has slots.

**What went red?**

| task | means | do |
|---|---|---|
| `recipes` (where `[training] tuned = true`) | a method has no recipe for this target and preset: nothing was trained | run the commands that its log names, then clear the task |
| `train [method, seed]` | this method only: the others go on, and the comparison says who is missing | read its log; clear the task, then `compare` |
| `compare` | no method finished, or MLflow is away | clear the task |
| `register`, `promote`, `report` | MLflow is away | clear the task |

A gate that says no is not red: `promote` returns why (so do the version's tags in MLflow), and
`announce_champion` is skipped. The task `report` has a button that leads to the page with all of it.

By hand: trigger it with other methods, seeds, preset, or an older `table_version`.
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
