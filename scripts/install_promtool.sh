#!/usr/bin/env bash
# scripts/install_promtool.sh FOLDER: put promtool, which checks our alerts, into FOLDER.
# Nothing is installed on the machine and root is not needed: a promtool that is there is linked,
# else the one in Debian's package `prometheus` is unpacked alone (19 MB to fetch).
set -euo pipefail

folder=${1:?usage: scripts/install_promtool.sh FOLDER}
target=$folder/promtool
[[ ! -x $target ]] || exit 0

fail() {
    echo "promtool is not available: $*. Install Prometheus's promtool, then run this again." >&2
    exit 1
}

if found=$(command -v promtool); then
    ln -sf "$found" "$target"
    exit 0
fi
for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || fail "there is no $tool to fetch it with"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
apt=(timeout 120 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20
    -o APT::Sandbox::User=root)

# With the machine's list of packages, or where it has none, or an old one, with one of our own.
fetch() { (cd "$work" && "${apt[@]}" "$@" download prometheus) >>"$work/log" 2>&1; }
if ! fetch; then
    own=(-o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache")
    "${apt[@]}" "${own[@]}" update >>"$work/log" 2>&1 || true
    fetch "${own[@]}" || fail "apt-get cannot fetch package prometheus ($(tail -n 1 "$work/log"))"
fi
dpkg-deb --fsys-tarfile "$work"/prometheus_*.deb | tar -x -C "$work" ./usr/bin/promtool ||
    fail "package prometheus has no usr/bin/promtool"
"$work/usr/bin/promtool" --version >/dev/null 2>&1 || fail "the one in package prometheus does not run"
mv "$work/usr/bin/promtool" "$target"
