# Sourced by run, nightly and mutate: an empty place to work in, and the few words both are written with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work TORCHINDUCTOR_CACHE_DIR=$work/inductor # what an earlier run compiled must not help this one
unset PYTHONPATH

stage() { # stage NAME COMMAND...: run it and say how long it took
    local started=$SECONDS
    printf '\n=== %s\n' "$1"
    "${@:2}"
    printf '=== %s: ok, %d s\n' "$1" $((SECONDS - started))
}

venv() { # venv NAME: make an empty environment and switch to it
    "${PYTHON:-python3}" -m venv "$work/$1"
    source "$work/$1/bin/activate"
}

readme_command() { # readme_command END: the one command in README.md's bash blocks that ends so
    local lines
    mapfile -t lines < <(awk '/^```/ { inside = $0 == "```bash"; next } inside' README.md | grep -F -- "$1")
    if [[ ${#lines[@]} != 1 || ${lines[0]} != *"$1" ]]; then
        echo "README.md must have one command ending in '$1' in its bash blocks, it has ${#lines[@]}:" "${lines[@]}" >&2
        return 1
    fi
    echo "${lines[0]}"
}
