#!/bin/sh
# What a container of the image `spark` does, by its first word: master, worker MASTER,
# or what Spark's scheduler for Kubernetes asks of its images (driver, executor); else, that command.
set -eu

SPARK_HOME=$(python -c 'import os, pyspark; print(os.path.dirname(pyspark.__file__))')
export SPARK_HOME
role=${1:-help}
[ $# -eq 0 ] || shift

# The values of SPARK_JAVA_OPT_<n>, a line each, in the order of n.
java_options() {
  env | grep '^SPARK_JAVA_OPT_' | sort -t_ -k4n | sed 's/^[^=]*=//' || true
}

case $role in
  master)
    exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.master.Master "$@" ;;
  worker)
    exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.worker.Worker "$@" ;;
  driver)
    exec "$SPARK_HOME/bin/spark-submit" \
      --conf "spark.driver.bindAddress=$SPARK_DRIVER_BIND_ADDRESS" \
      --conf "spark.executorEnv.SPARK_DRIVER_POD_IP=$SPARK_DRIVER_BIND_ADDRESS" \
      --deploy-mode client "$@" ;;
  executor)
    classes="${SPARK_CONF_DIR:-$SPARK_HOME/conf}:$SPARK_HOME/jars/*${SPARK_EXTRA_CLASSPATH:+:$SPARK_EXTRA_CLASSPATH}"
    # Each option is one word, however many blanks it has.
    set --
    while IFS= read -r option; do
      [ -z "$option" ] || set -- "$@" "$option"
    done <<END
$(java_options)
END
    exec java "$@" "-Xms$SPARK_EXECUTOR_MEMORY" "-Xmx$SPARK_EXECUTOR_MEMORY" -cp "$classes" \
      org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \
      --driver-url "$SPARK_DRIVER_URL" --executor-id "$SPARK_EXECUTOR_ID" \
      --cores "$SPARK_EXECUTOR_CORES" --app-id "$SPARK_APPLICATION_ID" \
      --hostname "$SPARK_EXECUTOR_POD_IP" --resourceProfileId "$SPARK_RESOURCE_PROFILE_ID" \
      --podName "$SPARK_EXECUTOR_POD_NAME" ;;
  help)
    echo "give master, worker spark://host:7077, or a command" >&2
    exit 2 ;;
  *)
    exec "$role" "$@" ;;
esac
