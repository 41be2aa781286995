#!/usr/bin/env bash
# SLURM, munge and, for accounting, slurmdbd with MariaDB, on Debian or Ubuntu, as root: 200 MB.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server >/dev/null
