#!/usr/bin/env bash
# serve.sh FOLDER [options of `mlflow server`]: an MLflow server for a group, over a PostgreSQL of its own, until
# Ctrl-C or SIGTERM. FOLDER, on a disk of this machine, holds the database and the files of runs; started again, the
# server goes on with them. Nothing but 127.0.0.1 is listened to unless options say so. Once it was started with
# MLFLOW_AUTH_ADMIN_PASSWORD in the environment, the server asks for names and passwords. Needs PostgreSQL (Debian:
# apt-get install postgresql) and pip install 'relloc[server]'.
set -euo pipefail
[ $# -gt 0 ] || { echo "which folder? serve.sh FOLDER [options of mlflow server]" >&2; exit 1; }
folder=$(realpath -ms -- "$1")
shift
socket=$folder/db/.s.PGSQL.5432
if [ "$(printf %s "$socket" | wc -c)" -gt 107 ]; then # what an address of a socket can hold
  echo "$folder is too long a path for PostgreSQL's socket, $socket, of 107 bytes at most: name a shorter one" >&2; exit 1
fi
case $folder in *[\&%,+\'\"\\]*) # which mean something else in the database's address or settings
  echo "$folder has one of & % , + ' \" \\ in its path: name a folder without" >&2; exit 1 ;;
esac
mkdir -p "$folder"
cd "$folder"
umask 077 # hashes of passwords, and the files of runs, which the server hands out
folder=$PWD
exec 9>lock
flock -n 9 || { echo "$folder is served already" >&2; exit 1; }
initdb=$(command -v initdb || ls /usr/lib/postgresql/*/bin/initdb 2>/dev/null | sort -V | tail -n 1)
bin=$(dirname "$(readlink -f "${initdb:-none}")")
[ -x "$bin/initdb" ] || { echo "PostgreSQL is not installed (Debian: apt-get install postgresql)" >&2; exit 1; }
as_owner=()
if [ "$(id -u)" = 0 ]; then as_owner=(runuser -u postgres --); fi # PostgreSQL refuses to run as root

# The folder of the database, which only its owner may enter, has the socket too: no network, and no password to keep.
if [ ! -f db/PG_VERSION ]; then
  install -d -m 700 ${as_owner:+-o postgres} db
  "${as_owner[@]}" "$bin/initdb" -D "$folder/db" -U mlflow -A trust -E UTF8 --locale=C >initdb.log
fi
if ! "${as_owner[@]}" "$bin/pg_ctl" -D "$folder/db" status >/dev/null; then
  "${as_owner[@]}" "$bin/pg_ctl" -D "$folder/db" -w -s -l "$folder/db/log" \
    -o "-c listen_addresses='' -c unix_socket_directories='$folder/db'" start </dev/null >/dev/null 9>&- ||
    { echo "PostgreSQL did not start: $folder/db/log says why" >&2; exit 1; }
fi
trap '"${as_owner[@]}" "$bin/pg_ctl" -D "$folder/db" -m fast -s stop' EXIT
asked() { "$bin/psql" -h "$folder/db" -U mlflow -d postgres -tAc "$1"; }
[ "$(asked "SELECT 1 FROM pg_database WHERE datname = 'mlflow'")" = 1 ] || asked "CREATE DATABASE mlflow" >/dev/null

options=(--workers 1 --backend-store-uri "postgresql+psycopg://mlflow@/mlflow?host=$folder/db"
  --artifacts-destination "$folder/artifacts")
if [ -n "${MLFLOW_AUTH_ADMIN_PASSWORD:-}" ] || [ -f basic_auth.db ]; then # never open again by mistake
  [ -f secret_key ] || head -c 32 /dev/urandom | base64 >secret_key
  export MLFLOW_FLASK_SERVER_SECRET_KEY=${MLFLOW_FLASK_SERVER_SECRET_KEY:-$(cat secret_key)}
  options+=(--app-name basic-auth)
fi
# Without the part of MLflow that runs jobs of language models, which is 13 processes and 2 GB.
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
mlflow server "${options[@]}" "$@" 9>&- &
server=$!
trap 'kill "$server" 2>/dev/null' INT TERM
wait "$server" && code=0 || code=$?
wait "$server" 2>/dev/null || true # a signal ends the first wait before the server has ended
exit "$code"
