#!/usr/bin/env bash
# A Ray head on one machine with N GPUs, for studies that are submitted and watched in the dashboard.
#
#   GPUS=4 cluster/manifests/one-machine.sh          # runs until Ctrl-C, which ends all of it
#   maskstudy submit my.yaml --address http://127.0.0.1:8265      # in another terminal
#
# Without a dashboard none of this is needed: `maskstudy run my.yaml` starts a Ray of its own.
set -euo pipefail

GPUS="${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
CPUS="${CPUS:-$(nproc)}"
PORT="${PORT:-6379}"
DASHBOARD_PORT="${DASHBOARD_PORT:-8265}"

# Who may talk to Ray may run code as you: only holders of the token, and only from this machine.
export RAY_AUTH_MODE=token
umask 077
if [ ! -s "${RAY_AUTH_TOKEN_PATH:=$HOME/.ray/auth_token}" ]; then
  mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
  python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
fi
chmod 600 "$RAY_AUTH_TOKEN_PATH"
export RAY_AUTH_TOKEN_PATH
echo "in other terminals: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"
echo "dashboard: http://127.0.0.1:$DASHBOARD_PORT, with the token in that file"

exec ray start --head --block --disable-usage-stats \
  --node-ip-address=127.0.0.1 --port="$PORT" \
  --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT" \
  --num-cpus="$CPUS" --num-gpus="$GPUS" "$@"
