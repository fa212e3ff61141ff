#!/bin/bash
# sbatch recipes/slurm/online-two-nodes.sh online.yaml MODEL [ddp-8-gpus.yaml]: the first node trains on its eight GPUs (FSDP2,
# or the named file of recipes/accelerate), the second samples with a vLLM server on each of its own.
# MODEL is what the run starts with; `vllm` may be in an environment of its own: name its program in VLLM.
#SBATCH --job-name=ncalign-online
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
run=${1:?give the configuration of the run: sbatch recipes/slurm/online-two-nodes.sh online.yaml MODEL}
export model=${2:?give the model that the run starts with: sbatch recipes/slurm/online-two-nodes.sh online.yaml MODEL}
launcher=recipes/accelerate/${3:-fsdp2-8-gpus.yaml}
export vllm=${VLLM:-vllm}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
trainer=${nodes%%$'\n'*} sampler=${nodes##*$'\n'}

# push: lora loads adapters, push: folder reloads weights; both read them from output_dir, which the nodes share. For push: nccl,
# which has no files, give --weight-transfer-config.backend nccl below in place of --enable-lora and --max-lora-rank.
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_SERVER_DEV_MODE=1
srun --nodes=1 --ntasks=1 --nodelist="$sampler" bash -c 'for gpu in {0..7}; do
  CUDA_VISIBLE_DEVICES=$gpu "$vllm" serve "$model" --served-model-name policy --port 800$gpu --enable-lora --max-lora-rank 64 &
done; wait' &
servers=$!
trap 'kill "$servers" 2>/dev/null || true' EXIT
urls=
for gpu in {0..7}; do
  until curl --silent --fail --output /dev/null "http://$sampler:800$gpu/health"; do
    kill -0 "$servers" || { echo "the servers on $sampler have ended before they answered" >&2; exit 1; }
    sleep 5
  done
  urls+=${urls:+,}http://$sampler:800$gpu/v1
done

# A job that is requeued goes on, on whichever nodes it gets.
srun --nodes=1 --ntasks=1 --nodelist="$trainer" --kill-on-bad-exit=1 accelerate launch --config_file "$launcher" \
  -m ncalign online --config "$run" --generator server --server.model policy --server.base_urls "$urls" --resume
