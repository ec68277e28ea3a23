#!/usr/bin/env bash
# A real Slurm of one node on this machine, for tests/test_grids.py; as root, on Debian or Ubuntu. It overwrites
# /etc/slurm/slurm.conf: not for a machine that is part of a cluster.
#
#     bash tests/local_slurm.sh          # installs slurm-wlm and munge where they are missing, and starts
#     bash tests/local_slurm.sh stop
set -euo pipefail
dir=/tmp/local-slurm
host=$(hostname -s)
if [[ ${1:-start} == stop ]]; then
    for daemon in slurmctld slurmd munged; do
        pkill -x "$daemon" || true
        while pgrep -x "$daemon" > /dev/null; do sleep 0.2; done
    done
    exit
fi
for tool in slurmctld munged; do
    if ! command -v "$tool" > /dev/null; then
        apt-get update -qq > /dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge > /dev/null
        break
    fi
done
mkdir -p /etc/slurm /run/munge /var/log/munge "$dir/state" "$dir/spool"
chown munge:munge /run/munge /var/log/munge
cat > /etc/slurm/slurm.conf << CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
pgrep -x munged > /dev/null || runuser -u munge -- munged --force
sleep 1
pgrep -x slurmctld > /dev/null || slurmctld
pgrep -x slurmd > /dev/null || slurmd
for _ in $(seq 10); do # sinfo tries for minutes where nobody answers
    if [[ $(timeout 5 sinfo -h -o %T 2> /dev/null) == idle ]]; then exit; fi
    sleep 0.5
done
echo "error: Slurm did not come up, see $dir/*.log" >&2
exit 1
