"""# The history, in one go

Everything that the landing folder has and the tables have not: `jobs run` without a day, so
nothing is late. One task, one Spark application, audits included; start it by hand, once, before
the first night. Running it again is harmless: what was read before is recognised.

**It went red?** The log's last lines say what, where and the remedy. Fix it and clear the task.
"""

import sys
from pathlib import Path

from airflow.sdk import DAG

sys.path.append(str(Path(__file__).parent))  # Airflow does this itself; other readers do not
import mill

for source in mill.sources():
    with DAG(
        f"load_history.{source.name}",
        schedule=None,
        start_date=mill.LONG_AGO,
        max_active_runs=1,
        default_args=mill.PATIENCE,
        doc_md=__doc__,
        tags=["sessionmill", source.name],
    ):
        history = mill.spark_job(source, "run", by_day=False)
        announced = mill.announce(source, "run.all.json")

        history >> announced
