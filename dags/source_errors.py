"""Makes mistakes in source files visible: they are the import error of this file (Airflow reads it
like a DAG file). It has no DAG of its own, because an import error takes every DAG of its file
out of service; so a broken source file stops its own DAGs only.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # Airflow does this itself; other readers do not
import mill

if mistakes := mill.source_errors():
    raise mill.SourceError("\n".join(mistakes))
