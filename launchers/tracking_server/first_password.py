"""Creates the admin of an MLflow server with the password on standard input, unless one exists.

`mlflow server` does that itself with a password from its environment, where it stays readable for
as long as the server lives, also in all processes that it starts. What this process puts into its
own environment can't be read by others.
"""

import os
import sys

os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"] = sys.stdin.read().removesuffix("\n")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.exceptions import MlflowException
from mlflow.server.auth import bootstrap_admin_user

try:
    bootstrap_admin_user()
except MlflowException as error:
    sys.exit(str(error))
