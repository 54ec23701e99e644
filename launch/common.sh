# Sourced by the scripts beside it: reads a recipe, then runs or prints one command.
# A recipe holds values only, KEY=VALUE a line; nothing in it is executed.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}

die() { echo "${0##*/}: $1" >&2; exit 2; }

read_recipe() { # name or file
  local file=$1 key value model=${MODEL:-}
  [[ -f $file ]] || file=$launch/recipes/$1.env
  [[ -f $file ]] || die "recipe '$1' not found; there are: $(cd "$launch/recipes" && echo *.env)"
  unset DEVICE RANKS TINY FLAGS MOELB_FLAGS PREFILL_FLAGS DECODE_FLAGS
  while IFS='=' read -r key value || [[ -n $key ]]; do
    case $key in
      '' | '#'*) ;;
      MODEL | DEVICE | RANKS | TINY | FLAGS | MOELB_FLAGS | PREFILL_FLAGS | DECODE_FLAGS)
        printf -v "$key" '%s' "$value" ;;
      *) die "$file: unknown key '$key'" ;;
    esac
  done < "$file"
  MODEL=${model:-$MODEL}
  read -ra flags <<< "${FLAGS:-}"
  read -ra moelb_flags <<< "${MOELB_FLAGS:-}"
  server=("$PYTHON" -m sglang.launch_server --tp-size "$RANKS")
  [[ $DEVICE != cpu ]] || server=("$PYTHON" -m sglang_moelb.ep.standin.launch --ranks "$RANKS" --)
  server+=(--model-path "$MODEL" "${flags[@]}")
}

start() { # command...
  if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "$@"; echo; return; fi
  [[ -z ${TINY:-} ]] || "$PYTHON" -c 'import sys; from sglang_moelb.demo.models import write_model
write_model(*sys.argv[1:])' "$TINY" "$MODEL"
  exec "$@"
}
