"""Makes mistakes in source files visible: they are the import error of this file (Airflow reads it
like a DAG file). It has no DAG of its own, because an import error takes every DAG of its file
out of service; so a broken source file stops its own DAGs only.
"""

from sessionmill_dags import dag_factory

if mistakes := dag_factory.source_errors():
    raise dag_factory.SourceError("\n".join(mistakes))
