#!/usr/bin/env bash
# LAMBADA of a model as the published scripts ask for it: bash eval.sh MODEL [fp16|w8a8|w4a8|w4a16] [flags of main.py]
set -euo pipefail

usage() {
  echo "$1, expected: bash eval.sh MODEL [fp16|w8a8|w4a8|w4a16] [flags of main.py]." >&2
  exit 2
}

[ $# -ge 1 ] || usage "There is no MODEL"
model=$1
precision=${2:-fp16}
shift $(($# < 2 ? $# : 2))

flags=(--batch_size 16 --eval_zero_shot --task_list lambada_openai --pretrained_dir ./pretrained_models --log_dir logs)
quantized=(--quantize --quantize_embedding --quantize_lm_head)
case $precision in
  fp16) quantized=() ;;
  w8a8) quantized+=(--w_bits 8 --a_bits 8) ;;
  w4a8) quantized+=(--w_bits 4 --a_bits 8 --apply_gptq) ;;
  w4a16) quantized+=(--w_bits 4 --a_bits 16 --apply_gptq) ;;
  *) usage "The precision is '$precision'" ;;
esac
if [ "$precision" != fp16 ] && [[ $model == *mamba2* ]]; then
  quantized+=(--group_heads)
fi

exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/main.py" "$model" "${flags[@]}" "${quantized[@]}" "$@"
