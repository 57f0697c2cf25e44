#!/bin/sh
# Lays the project into an empty volume, then runs what the container was asked for.
#   start prepare          the volume and the ledger's tables, once
#   start mlflow-server    MLflow with a user and password, its files in S3
#   start COMMAND ...
set -eu
case "${1:-}" in
prepare)
    cp --recursive --no-clobber /opt/fade/. "$FADE_ROOT"/
    cd "$FADE_ROOT"
    [ -d .dvc ] || dvc init --no-scm --quiet
    mkdir -p data/release
    if [ -n "${PUBLIC_KEY_FOLDER:-}" ]; then
        # The runtime is given this folder, and never the one with the signing key.
        python -c 'from fade.signing import signing_key; from flows.releasing.released import KEYS; signing_key(KEYS)'
        cp .fade/keys/public.pem "$PUBLIC_KEY_FOLDER"/
    fi
    exec fade ledger upgrade
    ;;
mlflow-server)
    umask 077
    # MLflow reads this address from a file alone.
    cat >/tmp/auth.ini <<INI
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = ${MLFLOW_BACKEND_STORE_URI}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
    export MLFLOW_AUTH_CONFIG_PATH=/tmp/auth.ini MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
    exec mlflow server --host 0.0.0.0 --port 5000 --workers 1 --app-name fade-users \
        --artifacts-destination "$MLFLOW_ARTIFACTS" --allowed-hosts "$MLFLOW_ALLOWED_HOSTS"
    ;;
*)
    exec "$@"
    ;;
esac
