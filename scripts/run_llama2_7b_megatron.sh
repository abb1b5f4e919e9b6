#!/bin/bash
# Fine-tune LLaMA-2-7B on this machine, without a daemon.
#
#   scripts/run_llama2_7b_megatron.sh NPROC SAVE_DIR [key=value...]
#
# NPROC is the number of GPUs (ranks). The run's folder is SAVE_DIR/llama2-7b. The same command again resumes from the last
# checkpoint. Model and data come from the environment or, like every other key, from key=value:
#
#   MODEL        model.partial_pretrain   folder of meta-llama/Llama-2-7b-hf
#   TRAIN_FILES  data.train_files         Parquet files, separated by commas; `sftd prepare` writes them
#   VAL_FILES    data.val_files           the same for validation; optional
#   CONFIG       -                        another YAML file than run_llama2_7b_megatron.yaml, such as run_llama3_8b_lora.yaml
#
# Without layout keys, 8 ranks train TP2 x PP2 x VPP2 x DP2, 4 ranks TP2 x PP2 x VPP2, 2 ranks TP2 (each with sequence
# parallelism), and other numbers train data parallel. If any *_model_parallel_size is given, the others are 1. All other
# settings are in CONFIG, beside this script.
set -euo pipefail

usage() {
    sed -n '2,16s/^# \{0,1\}//p' "$0"
}

fail() {
    printf 'run_llama2_7b_megatron.sh: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

case ${1:-} in -h | --help) usage; exit 0 ;; esac
[ $# -ge 2 ] || fail "NPROC and SAVE_DIR are needed"
nproc=$1 save_dir=$2
shift 2
arguments=("$@")
[[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "NPROC is '$nproc', which is not a number of ranks"
[[ $save_dir != *=* ]] || fail "SAVE_DIR is '$save_dir', which looks like a key"

# Whether a key that matches the pattern is among the arguments.
given() {
    local argument
    for argument in "${arguments[@]}"; do
        [[ $argument =~ ^\+?($1)= ]] && return 0
    done
    return 1
}

# Quote a text, and a list a,b,c of texts, for YAML.
text() {
    printf "'%s'" "${1//\'/\'\'}"
}
list() {
    local items item joined=
    IFS=, read -ra items <<<"$1"
    for item in "${items[@]}"; do
        joined+=$(text "$item"),
    done
    printf '[%s]' "${joined%,}"
}

[ -n "${MODEL:-}" ] || given 'model\.(partial_pretrain|path)' ||
    fail "no model: set MODEL, or give model.partial_pretrain=FOLDER"
[ -n "${TRAIN_FILES:-}" ] || given 'data\.train_files' ||
    fail "no data: set TRAIN_FILES, or give data.train_files=FILE"

tp=1 pp=1 vpp=null sp=false
if ! given '.*_model_parallel_size'; then
    case $nproc in
        8 | 4) tp=2 pp=2 vpp=2 sp=true ;;
        2) tp=2 sp=true ;;
    esac
fi
keys=(
    "checkpoint.save_dir=$(text "$save_dir")"
    "model.megatron.tensor_model_parallel_size=$tp"
    "model.megatron.pipeline_model_parallel_size=$pp"
    "model.megatron.virtual_pipeline_model_parallel_size=$vpp"
    "model.megatron.sequence_parallel=$sp"
)
[ -z "${MODEL:-}" ] || keys+=("model.partial_pretrain=$(text "$MODEL")")
[ -z "${TRAIN_FILES:-}" ] || keys+=("data.train_files=$(list "$TRAIN_FILES")")
[ -z "${VAL_FILES:-}" ] || keys+=("data.val_files=$(list "$VAL_FILES")")

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
if [ -x "$root/.venv/bin/torchrun" ]; then
    torchrun=("$root/.venv/bin/torchrun")
else
    torchrun=(python3 -m torch.distributed.run)
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
threads=$(($(getconf _NPROCESSORS_ONLN) / nproc))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# After Ctrl-C the ranks save a checkpoint of some 100 GB; torchrun would kill them after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}"
exec "${torchrun[@]}" --standalone --nnodes=1 "--nproc-per-node=$nproc" --max-restarts=0 \
    -m sftd.trainer "${CONFIG:-$here/run_llama2_7b_megatron.yaml}" "${keys[@]}" "${arguments[@]}"
