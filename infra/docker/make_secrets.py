"""The secrets of docker-compose.yml, made on this machine: `python infra/docker/make_secrets.py >> .env`."""

import base64
import secrets

NAMES = ("POSTGRES_PASSWORD", "AIRFLOW_API_SECRET", "AIRFLOW_JWT_SECRET", "SESSIONMILL_ID_KEY")

for name in NAMES:
    print(f"{name}={secrets.token_hex(32)}")
print(f"AIRFLOW_FERNET_KEY={base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()}")
