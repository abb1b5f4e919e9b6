#!/bin/bash
# Attempt 2 of brave-otter-12ab, written by sftd. It starts once and in this folder only: to train again,
# use `sftd resume brave-otter-12ab`.
#SBATCH --job-name=sftd-brave-otter-12ab-2
#SBATCH --output="/shared/100%% mine/attempt-0002/output.log"
#SBATCH --open-mode=append
#SBATCH --chdir="/shared/100% mine/attempt-0002"
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@600
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --qos=long
#SBATCH --time=2-0
#SBATCH --gres=gpu:8
#SBATCH --constraint=h100&nvlink
#SBATCH --exclude=n[3,7-9]
#SBATCH --mem=0
#SBATCH --exclusive

umask 077
cd '/shared/100% mine/attempt-0002' || exit 75

# An attempt has one writer: a job that Slurm requeued, or that the daemon abandoned, ends here. mkdir succeeds only
# once, on all machines together.
if [ -e fence ] || ! mkdir started; then
    echo "sftd: job $SLURM_JOB_ID may not run this attempt (abandoned, or started before): nothing was started" >&2
    exit 75
fi
echo "$SLURM_JOB_ID" > started/job

# The time limit or a preemption is near: the ranks save a checkpoint at the next step and end.
stop() {
    echo "$1" > told
    touch stop
    interrupted=1
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

export SFTD_ATTEMPT_TOKEN=t
export SFTD_DEVICE=cuda
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=12

# launch.slurm.setup
module load cuda
export NCCL_SOCKET_IFNAME=ib0

set +eu
cd '/shared/100% mine/attempt-0002' || exit 75

# The rendezvous is on the first machine, which runs this script.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export PET_RDZV_ENDPOINT="$SLURMD_NODENAME:$port"

# One torchrun for each machine. When one fails, srun ends the others.
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --kill-on-bad-exit=1 \
    bash -c 'PET_RDZV_CONF=is_host=$([ "$SLURM_NODEID" = 0 ] && echo true || echo false) PET_LOCAL_ADDR="$SLURMD_NODENAME" exec "$@"' torchrun python -m torch.distributed.run --nnodes=2 'it'"'"'s' &
step=$!
# A signal interrupts `wait` before the exit code is known.
interrupted=1
while [ "$interrupted" ]; do
    interrupted=
    wait "$step"
    code=$?
done
echo "$code" > exit.partial && mv exit.partial exit
exit "$code"
