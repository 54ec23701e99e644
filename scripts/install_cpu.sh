#!/usr/bin/env bash
# Make .venv at the root of the repository: SGLang 0.5.23 for a machine without a GPU, and this
# package in it (editable). Run it again at any time: it does nothing while the environment is up to
# date. Python 3.11 or 3.12; PYTHON=/path/to/python chooses one.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/moelb-installed
log=$venv/install.log
start=$SECONDS

say() { printf '[%3d s] %s\n' $((SECONDS - start)) "$*"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "no Python 3.11 or 3.12 found (tried: ${PYTHON:-python3.11 python3.12 python3});" \
        "install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

# Run pip with the given arguments; show its main lines, keep all of them in the log.
pip_install() {
    if ! "$venv/bin/python" -m pip install --no-compile --progress-bar off \
        --disable-pip-version-check "$@" 2>&1 |
        tee -a "$log" | { grep -E --line-buffered '^(Collecting|  Downloading|Installing)' || true; } |
        cut -c 1-100; then
        echo "pip failed; the last lines of $log:" >&2
        tail -n 15 "$log" >&2
        return 1
    fi
}

python=$(find_python)
want=$({
    "$python" --version
    cat "$root"/requirements/cpu.txt "$root"/requirements/cpu-nodeps.txt "$root/pyproject.toml"
    echo "$root"
} | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then
    say "$venv is up to date"
    exit 0
fi

say "making $venv with $("$python" --version), then installing about 2 GB; log: $log"
"$python" -m venv "$venv"
rm -f "$stamp"
: >"$log"
say "1 of 4: torch and the pure packages (requirements/cpu.txt)"
pip_install -r "$root/requirements/cpu.txt"
say "2 of 4: SGLang without its GPU packages (requirements/cpu-nodeps.txt)"
pip_install --no-deps -r "$root/requirements/cpu-nodeps.txt"
say "3 of 4: this package"
pip_install --no-deps --no-build-isolation -e "$root"
say "4 of 4: bytecode, on all cores, which pip would write on one"
# Left to the first import: what is imported seldom. Some packages carry files that no Python 3 can
# compile; pip passes over them too.
"$venv/bin/python" -m compileall -qq -j 0 \
    -x '/tests?/|/torch/testing/|/transformers/models/|/sglang/multimodal_gen/' \
    "$venv/lib" >>"$log" || true
say "$("$venv/bin/python" -c '
import torch
build = f"built for CUDA {torch.version.cuda}, used on the CPU" if torch.version.cuda else "CPU build"
print(f"torch {torch.__version__}: {build}")')"
echo "$want" >"$stamp"
say "done: $venv/bin/moelb"
