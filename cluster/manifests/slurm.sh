#!/usr/bin/env bash
# A study on SLURM: Ray on every node of the job, the driver on the first.
#
#   sbatch cluster/manifests/slurm.sh /shared/my.yaml
#
# Before its time limit the job stops the study, puts itself back in the queue, and goes on there.
# The study's storage and this environment must lie on a file system that all nodes share.
#SBATCH --job-name=maskstudy
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

STUDY="${1:?usage: sbatch slurm.sh STUDY.yaml}"
VENV="${VENV:-$HOME/maskstudy}"  # python3 -m venv $VENV; pip install "ray==..." "maskstudy==..."
PORT="${PORT:-$((20000 + SLURM_JOB_ID % 10000))}"  # other people's jobs share the nodes
if [ -f "$VENV/bin/activate" ]; then source "$VENV/bin/activate"; fi

# Who may talk to Ray may run code as you; home is shared, so every node finds the token.
export RAY_AUTH_MODE=token
umask 077
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
  python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip="$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')"
export RAY_ADDRESS="$head_ip:$PORT"
each=(--block --disable-usage-stats --num-cpus="${SLURM_CPUS_PER_TASK:-1}"
  --num-gpus="${SLURM_GPUS_ON_NODE:-0}")

# --overlap: these steps keep their nodes' cores while others start
srun --overlap --nodes=1 --ntasks=1 -w "${nodes[0]}" env -u RAY_ADDRESS \
  ray start --head --node-ip-address="$head_ip" --port="$PORT" \
  --dashboard-host=127.0.0.1 "${each[@]}" &
for node in "${nodes[@]:1}"; do
  srun --overlap --nodes=1 --ntasks=1 -w "$node" env -u RAY_ADDRESS \
    ray start --address="$head_ip:$PORT" "${each[@]}" &
done

# How many trials run at once is counted when the study starts: wait for all nodes.
timeout 600 python3 - "${#nodes[@]}" <<'PYTHON'
import sys, time
import ray

while True:
    try:
        ray.init(logging_level="ERROR")
        break
    except ConnectionError:
        time.sleep(3)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(2)
PYTHON

maskstudy run "$STUDY" &
driver=$!
was_told=
trap 'was_told=yes; kill -TERM "$driver"' TERM  # SLURM's, 180 s before the end of its time
code=0
wait "$driver" || code=$?
if [ "$was_told" ]; then  # which ended that wait
  code=0
  wait "$driver" || code=$?
fi
if [ "$code" -eq 130 ]; then  # interrupted, nothing is lost
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
