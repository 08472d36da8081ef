#!/usr/bin/env bash
# A one-node SLURM in the folder $2, no container: `slurm.sh start FOLDER` (as root; installs Debian's packages where
# they lack; exit status 77: they cannot be fetched) and `slurm.sh stop FOLDER`. Commands find it by
# SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
folder=$2
stop() {
    for name in slurmd slurmctld munged; do
        [ -s "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
}
if [ "$1" = stop ]; then stop; exit; fi

for program in slurmctld slurmd sbatch munged; do
    command -v $program >/dev/null || lacking=yes
done
if [ "${lacking-}" ]; then
    export DEBIAN_FRONTEND=noninteractive
    install="timeout 300 apt-get install -y -q -o DPkg::Lock::Timeout=120 --no-install-recommends"
    install+=" slurmctld slurmd slurm-client munge"
    $install --download-only || { timeout 300 apt-get update -q && $install --download-only; } || exit 77
    $install
fi
mkdir -p "$folder"/{state,spool}
chmod 755 "$folder"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
controller_port=$((20000 + RANDOM % 10000))
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
SlurmctldPort=$controller_port
SlurmdPort=$((controller_port + 10000))
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=2
MinJobAge=10
SlurmdParameters=config_overrides
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
trap 'stop; tail -n 20 "$folder"/*.log >&2' ERR
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
slurmctld -c
slurmd
for _ in $(seq 100); do
    [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && exit
    sleep 0.2
done
echo "the node did not become idle: $(sinfo --noheader --format='%T %E')" >&2
false
