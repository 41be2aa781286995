#!/usr/bin/env bash
# serve.sh FOLDER [options of `mlflow server`]: an MLflow server for a group, over a PostgreSQL of its own, until
# Ctrl-C or SIGTERM. FOLDER, on a disk of this machine, holds the database and the files of runs; started again, the
# server goes on with them, also after kill -9, which leaves processes that the next start ends or takes over. Nothing
# but 127.0.0.1 is listened to unless options say so. Once it was started with MLFLOW_AUTH_ADMIN_PASSWORD in the
# environment, the server asks for names and passwords. Needs PostgreSQL (Debian: apt-get install postgresql) and
# pip install 'relloc[server]'.
set -euo pipefail

# A process's environment can be read in /proc for as long as it lives, and is handed on to all that it starts. So the
# password goes into a pipe, this script starts anew without it, and nothing that it starts ever has it.
if [ -n "${MLFLOW_AUTH_ADMIN_PASSWORD:-}${MLFLOW_TRACKING_PASSWORD:-}" ]; then # the second one is for clients
  exec 8<<<"${MLFLOW_AUTH_ADMIN_PASSWORD:-}"
  exec env -u MLFLOW_AUTH_ADMIN_PASSWORD -u MLFLOW_TRACKING_PASSWORD RELLOC_PASSWORD_IN_PIPE=8 "$BASH" "$0" "$@"
fi
unset MLFLOW_AUTH_ADMIN_PASSWORD # an empty one counts for MLflow
password=
if [ -n "${RELLOC_PASSWORD_IN_PIPE:-}" ]; then
  password=$(cat <&8)
  exec 8<&-
  unset RELLOC_PASSWORD_IN_PIPE
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
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

# What a server that was killed (kill -9) left: MLflow's processes, which are known by a word in their environment. The
# lock, which no other script holds now, says that nobody looks after them.
of_mlflow() { grep -lzxFs -- "RELLOC_SERVED_FOLDER=$folder" /proc/[0-9]*/environ | cut -d / -f 3; }
end_mlflow() {
  local left signal
  for signal in TERM KILL; do
    for _ in $(seq 50); do
      left=$(of_mlflow) || true
      [ -n "$left" ] || return 0
      kill -s "$signal" $left 2>/dev/null || true
      sleep 0.2
    done
  done
}
end_mlflow

# The folder of the database, which only its owner may enter, has the socket too: no network, and no password to keep.
if [ ! -f db/PG_VERSION ]; then
  rm -rf db.unfinished # by an initdb that was killed
  install -d -m 700 ${as_owner:+-o postgres} db.unfinished
  "${as_owner[@]}" "$bin/initdb" -D "$folder/db.unfinished" -U mlflow -A trust -E UTF8 --locale=C >initdb.log
  mv -T db.unfinished db
fi
answers() { "$bin/pg_isready" -q -t 3 -h "$folder/db"; }
if ! answers; then
  # A process of that number may be another one by now (after a reboot, in a container), and PostgreSQL would not start.
  noted=$(head -n 1 db/postmaster.pid 2>/dev/null) || true
  if [ -n "$noted" ] && ! tr '\0' ' ' 2>/dev/null <"/proc/$noted/cmdline" | grep -qF -- "$folder/db"; then
    rm -f db/postmaster.pid
  fi
fi
start_database() {
  "${as_owner[@]}" "$bin/pg_ctl" -D "$folder/db" -w -s -l "$folder/db/log" \
    -o "-c listen_addresses='' -c unix_socket_directories='$folder/db'" start </dev/null >/dev/null 9>&-
}
if ! "${as_owner[@]}" "$bin/pg_ctl" -D "$folder/db" status >/dev/null; then
  # Of one that was killed, some processes may take seconds to notice.
  start_database 2>/dev/null || { sleep 5; start_database; } ||
    { echo "PostgreSQL did not start: $folder/db/log says why" >&2; exit 1; }
fi
for _ in $(seq 100); do # one that was left may be starting, or mending what a kill broke off
  answers && break
  sleep 0.3
done
answers || { echo "PostgreSQL does not answer: $folder/db/log says why" >&2; exit 1; }
trap '"${as_owner[@]}" "$bin/pg_ctl" -D "$folder/db" -m fast -s stop' EXIT
asked() { "$bin/psql" -h "$folder/db" -U mlflow -d postgres -tAc "$1"; }
[ "$(asked "SELECT 1 FROM pg_database WHERE datname = 'mlflow'")" = 1 ] || asked "CREATE DATABASE mlflow" >/dev/null

options=(--workers 1 --backend-store-uri "postgresql+psycopg://mlflow@/mlflow?host=$folder/db"
  --artifacts-destination "$folder/artifacts")
if [ -n "$password" ] || [ -f basic_auth.db ]; then # never open again by mistake
  [ -f secret_key ] || head -c 32 /dev/urandom | base64 >secret_key
  export MLFLOW_FLASK_SERVER_SECRET_KEY=${MLFLOW_FLASK_SERVER_SECRET_KEY:-$(cat secret_key)}
  options+=(--app-name basic-auth)
fi
if [ -n "$password" ]; then
  python=$(dirname "$(command -v mlflow)")/python
  [ -x "$python" ] || python=python3
  "$python" "$here/first_password.py" 9>&- <<<"$password" || exit 1
  password=
fi
# Without the part of MLflow that runs jobs of language models, which is 13 processes and 2 GB.
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
RELLOC_SERVED_FOLDER=$folder mlflow server "${options[@]}" "$@" 9>&- &
server=$!
trap 'kill "$server" 2>/dev/null' INT TERM HUP
wait "$server" && code=0 || code=$?
wait "$server" 2>/dev/null || true # a signal ends the first wait before the server has ended
end_mlflow # where only mlflow's first process was killed
exit "$code"
